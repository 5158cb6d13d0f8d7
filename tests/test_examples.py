"""Every example runs as it stands, and what docs/frameworks.md says of each framework holds.

Without its framework an example is skipped: `make examples` installs them.
"""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kronewton as kn
from kronewton.errors import CriterionError, KronewtonWarning

os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
FRAMEWORK = {
    "plain_loop": "torch",
    "huggingface_gpt2": "transformers",
    "huggingface_classifier": "transformers",
    "accelerate_loop": "accelerate",
    "lightning_automatic": "lightning",
    "lightning_manual": "lightning",
    "ignite_engine": "ignite",
}
FALLS = dict.fromkeys(FRAMEWORK, 0.05) | {
    "huggingface_gpt2": 0.8,
    "huggingface_classifier": 0.3,
}
# Newton's steps of fixed length: the same gradient makes the same step, but for rounding.
PINNED: dict[str, Any] = {
    "lr": 0.1, "momentum": 0.0, "damping": 0.1, "trust_region": None, "fisher": "empirical",
}  # fmt: skip


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """KFAC has nothing to warn of, and no Accelerator is left of the test before."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", KronewtonWarning)
        yield
    if importlib.util.find_spec("accelerate"):
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


def require(name: str) -> None:
    for package in (FRAMEWORK[name], "sklearn"):
        pytest.importorskip(package, reason=f"{package} is not installed: `make examples` does it")
    if FRAMEWORK[name] == "transformers":  # its Trainer needs it
        pytest.importorskip("accelerate", reason="accelerate is not installed")


def example(name: str) -> ModuleType:
    """An example as a module, or a skip where its framework is not there."""
    require(name)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def vector(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def close(one: nn.Module, other: nn.Module) -> bool:
    return torch.allclose(vector(one), vector(other), rtol=1e-4, atol=1e-5)


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(FRAMEWORK)


@pytest.mark.parametrize("name", FRAMEWORK)
def test_an_example_runs_as_it_stands(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    require(name)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    first, last = map(float, re.findall(r"the loss fell from ([\d.]+) to ([\d.]+\d)", printed)[0])
    assert last < FALLS[name] * first
    assert "False" not in re.findall(r"(?:checkpoint|closure|\.pt): (.*)", printed)
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_the_page_shows_nothing_that_is_not_run() -> None:
    sources = [*EXAMPLES.glob("*.py"), Path(__file__)]
    run = {line.strip() for path in sources for line in path.read_text("utf-8").splitlines()}
    page = (ROOT / "docs" / "frameworks.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    shown = [line.strip() for block in blocks for line in block.splitlines()]
    assert len(blocks) > 5
    assert [line for line in shown if line and line not in run] == []


# The digits: every loop over them makes the steps of this one.


def by_hand(
    epochs: int = 2,
    parts: int = 2,
    clip: float | None = 5.0,
    factor: Callable[[int], float] = lambda step: 1.0,
    **options: Any,
) -> nn.Module:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    X, Y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    criterion = nn.CrossEntropyLoss()
    optimizer = kn.KFAC(model, criterion, **options)
    first = optimizer.param_groups[0]["lr"]
    for step in range(7 * epochs):
        at = 256 * (step % 7)
        optimizer.zero_grad()
        for x, y in zip(X[at : at + 256].chunk(parts), Y[at : at + 256].chunk(parts), strict=True):
            (criterion(model(x), y) / parts).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.param_groups[0]["lr"] = first * factor(step)
        optimizer.step()
    return model


def each_epoch(step: int) -> float:
    return 1 - 0.7 * (step // 7) / 6


SETTINGS = pytest.mark.parametrize(
    ("parts", "clip", "options"), [(1, 5.0, {}), (2, 5.0, {}), (4, 0.1, {}), (2, 0.1, PINNED)]
)


def accelerated(folder: Path, parts: int, clip: float, options: dict[str, Any]) -> nn.Module:
    model: nn.Module = example("accelerate_loop").train(
        folder, epochs=2, parts=parts, clip=clip, **options
    )[1]
    return model


def automatic(folder: Path, parts: int, clip: float, options: dict[str, Any]) -> nn.Module:
    train = example("lightning_automatic").train
    model: nn.Module = train(folder, epochs=2, parts=parts, clip=clip, options=options)[0].model
    return model


@SETTINGS
@pytest.mark.parametrize("train", [accelerated, automatic])
def test_parts_and_clipping_and_a_schedule_are_those_of_a_loop_by_hand(
    train: Callable[..., nn.Module],
    parts: int,
    clip: float,
    options: dict[str, Any],
    tmp_path: Path,
) -> None:
    found = train(tmp_path, parts, clip, options)
    wanted = by_hand(parts=parts, clip=clip, factor=each_epoch, **options)
    assert close(found, wanted)
    assert not close(found, by_hand(parts=parts, clip=None if clip < 1 else 0.1, **options))


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("clip", [5.0, 0.1])
def test_manual_steps_are_those_of_a_loop_by_hand(
    clip: float, closure: bool, tmp_path: Path
) -> None:
    train = example("lightning_manual").train
    found = train(tmp_path, epochs=2, module={"clip": clip, "closure": closure})[0].model
    assert close(found, by_hand(parts=1, clip=clip))


@pytest.mark.parametrize("parts", [1, 2])
def test_an_engines_steps_are_those_of_a_loop_by_hand(parts: int, tmp_path: Path) -> None:
    found = example("ignite_engine").train(tmp_path, epochs=2, parts=parts)[1]

    def each_iteration(step: int) -> float:
        return 1 - 0.7 * ((step + 1) * parts - 1) / (6 * 7 * parts)

    assert close(found, by_hand(parts=parts, clip=None, factor=each_iteration))


@pytest.mark.parametrize("options", [{}, PINNED, {"basis": "adam"}, {"fisher": "exact"}])
def test_a_plain_loop_in_parts_resumes(options: dict[str, Any], tmp_path: Path) -> None:
    train = example("plain_loop").train
    whole, model = train(tmp_path / "half.pt", steps=12, save_at=6, parts=4, **options)
    again, resumed = train(tmp_path / "half.pt", steps=12, resume=True, parts=4, **options)
    assert again == whole[6:]
    assert torch.equal(vector(model), vector(resumed))


def test_manual_steps_resume(tmp_path: Path) -> None:
    train = example("lightning_manual").train
    whole, _ = train(tmp_path, epochs=2)
    _, half = train(tmp_path, epochs=1)
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest, _ = train(tmp_path, epochs=2, resume=tmp_path / "half.ckpt")
    assert len(rest.losses) == len(whole.losses) // 2
    assert torch.equal(vector(whole), vector(rest))


def test_a_lightning_checkpoint_has_nothing_but_tensors_and_numbers(tmp_path: Path) -> None:
    _, trainer = example("lightning_automatic").train(tmp_path, epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    (state,) = torch.load(tmp_path / "one.ckpt", weights_only=True)["optimizer_states"]
    assert state["state"]


def test_a_lightning_module_that_is_given_whole_but_not_called_is_told(tmp_path: Path) -> None:
    module = example("lightning_automatic")

    class Whole(module.Reader):  # type: ignore[misc, name-defined]
        def configure_optimizers(self) -> kn.KFAC:
            return kn.KFAC(self, self.criterion)

    module.Reader = Whole
    with pytest.raises(KronewtonWarning, match="Whole itself was not called"):
        module.train(tmp_path, epochs=1)


@pytest.mark.parametrize("name", ["accelerate_loop", "lightning_automatic", "lightning_manual"])
def test_bfloat16_trains_as_well(name: str, tmp_path: Path) -> None:
    module = example(name)
    if name == "accelerate_loop":
        losses = module.train(tmp_path, epochs=4, precision="bf16")[0]
    else:
        losses = module.train(tmp_path, epochs=4, precision="bf16-mixed")[0].losses
    assert losses[-1] < 0.1 * losses[0]


# Hugging Face.

FEW = {"use_cpu": True, "max_steps": 6, "logging_steps": 1}


def without_dropout(trainer: Any) -> Any:
    for module in trainer.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return trainer


def trained(
    name: str, folder: Path, options: dict[str, Any] | None = None, **arguments: Any
) -> Any:
    trainer = without_dropout(example(name).trainer_of(folder, options, **{**FEW, **arguments}))
    trainer.train()
    return trainer


def logged(trainer: Any, key: str) -> list[float]:
    return [float(entry[key]) for entry in trainer.state.log_history if key in entry]


HUGGING = pytest.mark.parametrize("name", ["huggingface_gpt2", "huggingface_classifier"])


@HUGGING
def test_a_trainer_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    """With dropout, which the Trainer seeds anew."""
    trainer_of = example(name).trainer_of
    whole = trainer_of(tmp_path / "one", **FEW, save_strategy="steps", save_steps=3)
    whole.train()
    rest = trainer_of(tmp_path / "two", **FEW)
    rest.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-3"))
    assert torch.equal(vector(whole.model), vector(rest.model))
    assert float(rest.optimizer.optimizer.diagnostics()["step"]) == 6


def test_a_trainers_accumulation_is_the_whole_batch(tmp_path: Path) -> None:
    """But for the table of positions, whose training gradient comes summed over the examples."""
    one = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    four = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    name, arguments = "huggingface_gpt2", {"max_steps": 1, "lr_scheduler_type": "constant"}
    before = without_dropout(example(name).trainer_of(tmp_path)).model
    whole, parts = (trained(name, tmp_path, PINNED, **batch, **arguments) for batch in (one, four))
    for (key, p), q, start in zip(
        whole.model.named_parameters(), parts.model.parameters(), before.parameters(), strict=True
    ):
        assert (p != start).any()
        if "wpe" not in key:
            assert float((p - q).detach().norm() / (p - start).detach().norm()) < 1e-3, key


@HUGGING
def test_a_trainers_clipping_shortens_the_step(name: str, tmp_path: Path) -> None:
    before = vector(without_dropout(example(name).trainer_of(tmp_path)).model)
    arguments = {"max_steps": 1, "lr_scheduler_type": "constant"}
    whole = trained(name, tmp_path, PINNED, **arguments)
    clipped = trained(name, tmp_path, PINNED, max_grad_norm=0.1, **arguments)
    share = 0.1 / logged(whole, "grad_norm")[0]
    assert share < 0.5
    step, shorter = vector(whole.model) - before, vector(clipped.model) - before
    torch.testing.assert_close(shorter, share * step, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("huggingface_gpt2", {"bf16": True}),
        ("huggingface_classifier", {"bf16": True}),
        ("huggingface_gpt2", {"gradient_checkpointing": True}),
    ],
)
def test_a_trainer_in_bfloat16_or_with_checkpointing(
    name: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    plain = logged(trained(name, tmp_path, max_steps=20), "loss")
    other = logged(trained(name, tmp_path, max_steps=20, **arguments), "loss")
    assert other[-1] < 0.75 * other[0]
    assert abs(other[-1] - plain[-1]) < 0.05 * plain[0]


@HUGGING
def test_everything_in_it_is_covered_by_k_fac(name: str, tmp_path: Path) -> None:
    rows = trained(name, tmp_path).optimizer.optimizer.coverage().rows
    assert [row.parameter for row in rows if "K-FAC" not in row.method] == []
    if name == "huggingface_gpt2":
        (tied,) = [row for row in rows if row.parameter == "transformer.wte.weight"]
        assert tied.method.startswith("sum of two K-FAC")
        assert {row.kind for row in rows if ".c_" in row.parameter} == {"linear"}


def test_a_trainers_schedule_multiplies_the_automatic_rate(tmp_path: Path) -> None:
    trainer = trained("huggingface_gpt2", tmp_path)
    assert logged(trainer, "learning_rate") == pytest.approx([(6 - k) / 6 for k in range(6)])
    assert trainer.optimizer.param_groups[0]["lr"] == 0


@pytest.mark.parametrize("parts", [1, 2])
def test_observing_the_loss_that_a_model_computes_itself(parts: int, tmp_path: Path) -> None:
    module = example("huggingface_gpt2")
    from transformers import Trainer

    criterion = nn.CrossEntropyLoss()

    class ObservingTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            if model.training:
                output, target = outputs.logits[:, :-1], inputs["labels"][:, 1:]
                kfac = self.optimizer.optimizer  # inside Accelerate's
                kfac.observe(output.flatten(0, 1), target.flatten(), criterion)
            return (loss, outputs) if return_outputs else loss

    module.Trainer = lambda *args, compute_loss_func, **rest: ObservingTrainer(*args, **rest)
    arguments = {"gradient_accumulation_steps": parts, "lr_scheduler_type": "constant"}
    options = {**PINNED, "fisher": "sampled"}
    found = without_dropout(module.trainer_of(tmp_path, options, **FEW, **arguments))
    found.train()
    wanted = trained("huggingface_gpt2", tmp_path, options, **arguments)
    assert close(found.model, wanted.model)

    # The loss of a model in bfloat16 is computed from other logits than Accelerate returns.
    half = module.trainer_of(tmp_path, **FEW, bf16=True)
    with pytest.raises(CriterionError, match="its loss was not differentiated"):
        half.train()


def test_without_a_criterion_the_model_may_compute_its_loss(tmp_path: Path) -> None:
    module = example("huggingface_gpt2")
    own = module.Trainer
    module.Trainer = lambda *args, compute_loss_func, **rest: own(*args, **rest)
    module.criterion = None
    trainer = module.trainer_of(tmp_path, **{**FEW, "max_steps": 30})
    trainer.train()
    losses, coverage = logged(trainer, "loss"), trainer.optimizer.optimizer.coverage()
    assert losses[-1] < 0.8 * losses[0]
    assert coverage.covered == 1
    assert "Fisher: empirical" in str(coverage)


def test_kwargs_that_have_lost_their_model_are_told(tmp_path: Path) -> None:
    """Trainer takes "model" out of the dictionary: who makes another one of it is told."""
    module = example("huggingface_classifier")
    trainer = module.trainer_of(tmp_path, **FEW)
    trainer.create_optimizer()
    cls, rest = trainer.optimizer_cls_and_kwargs
    assert "model" not in rest
    with pytest.raises(KronewtonWarning, match="no model"):
        module.Trainer(trainer.model, trainer.args, optimizer_cls_and_kwargs=(cls, rest)
                       ).create_optimizer()  # fmt: skip
