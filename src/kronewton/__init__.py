"""Kronecker-factored Newton steps for PyTorch.

>>> import kronewton as kn
>>> optimizer = kn.KFAC(model, criterion)  # then the training loop as it is
"""

from kronewton import derivation, errors, losses
from kronewton.explain import Explanation, explain
from kronewton.optimizer import KFAC
from kronewton.preconditioner import Preconditioner

__version__ = "0.1.0"
__all__ = [
    "KFAC",
    "Explanation",
    "Preconditioner",
    "__version__",
    "derivation",
    "errors",
    "explain",
    "losses",
]
