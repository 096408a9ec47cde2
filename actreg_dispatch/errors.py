"""The errors that concern the choice of a backend.

What is wrong with an array or a number is a plain :class:`TypeError` or :class:`ValueError`;
these classes exist so that a caller can catch a failed *choice* on its own.
"""

__all__ = ["BackendError", "BackendUnavailableError", "MixedArraysError", "UnknownBackendError"]


class BackendError(Exception):
    """Base class: no backend can serve the call as it was asked."""


class UnknownBackendError(BackendError, ValueError):
    """A name that no backend is registered under."""


class BackendUnavailableError(BackendError, RuntimeError):
    """A registered backend that cannot run here; the message says why and what to install."""


class MixedArraysError(BackendError, TypeError):
    """Activations and gradients that belong to different array libraries."""
