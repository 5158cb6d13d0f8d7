# Everything runs from .venv, which is made on demand and only when what it is made from changes.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lint bench slow audit examples clean

demo: $(READY)
	$(BIN)/kronewton demo --out demo

test: lint
	$(BIN)/pytest -n 2 -m "not slow"

lint: $(READY)
	$(BIN)/ruff check src tests examples
	$(BIN)/ruff format --check src tests examples
	$(BIN)/mypy

# Step costs, and four tasks by the clock: each rival at the best of three settings, three seeds.
bench: $(READY)
	$(BIN)/kronewton bench step-cost --out runs/step-cost
	$(BIN)/kronewton --threads 1 bench time-to-target --quick --out runs/time-to-target

slow: $(READY)
	$(BIN)/pytest -m slow

# Known vulnerabilities of the pinned versions; asks PyPI, and fails where it has no answer.
audit: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[audit]'
	$(BIN)/pip-audit --strict --progress-spinner off --no-deps --disable-pip -r constraints.txt

# With the frameworks that docs/frameworks.md is about, which nothing else needs.
examples: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[frameworks]'
	$(BIN)/pytest tests/test_examples.py

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf .venv build demo runs
