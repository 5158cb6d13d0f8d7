"""The errors and warnings a user can meet.

Each message says what was given, what is allowed, and what to do next. All errors derive from
KronewtonError and from the built-in that a reader would try to catch.
"""


class KronewtonError(Exception):
    """Base of every error that kronewton raises on purpose."""


class OptionError(KronewtonError, ValueError):
    """An option is out of its range, or two options contradict each other."""


class ModelError(KronewtonError, ValueError):
    """The model or its parameters cannot be trained as asked."""


class CriterionError(KronewtonError, ValueError):
    """The criterion, its output or its target does not fit what is watched."""


class UnsupportedError(KronewtonError, NotImplementedError):
    """A thing that is known and not supported, refused by name."""


class NotPositiveDefinite(KronewtonError, ArithmeticError):
    """A factor could not be inverted: not finite, or not positive however much was added."""


class SkippedError(KronewtonError, ArithmeticError):
    """Too many steps in a row could not be made."""


class StateError(KronewtonError, ValueError):
    """A state_dict does not belong to this optimizer and model."""


class DataError(KronewtonError, ValueError):
    """A file or data set is missing or is not what it says."""


class KronewtonWarning(UserWarning):
    """Something is done otherwise than a user might expect; said once."""
