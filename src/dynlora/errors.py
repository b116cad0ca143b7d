"""What this package raises, as one tree.

    DynLoraError
    ├── NotFiniteError (FloatingPointError)    a gradient, weight or score is NaN or infinite
    ├── CannotShrinkError (TypeError)          something depends on the shapes that would change
    ├── AdapterFileError (ValueError)          an adapter folder is damaged, or of another kind
    └── VerificationError (RuntimeError)       what was written does not compute what it should

A wrong argument raises ValueError or TypeError, as everywhere in Python.
"""


class DynLoraError(Exception):
    """Base of all errors of this package."""


class NotFiniteError(DynLoraError, FloatingPointError):
    """A gradient, an adapter weight or a score is NaN or infinite."""


class CannotShrinkError(DynLoraError, TypeError):
    """Something depends on the present shapes in a way that cannot be carried over to smaller ones."""


class AdapterFileError(DynLoraError, ValueError):
    """An adapter folder is damaged, incomplete, or holds something else."""


class VerificationError(DynLoraError, RuntimeError):
    """What was written, loaded again, does not compute what it should; nothing of it is left."""
