"""Errors that speak to a person: what was wrong, the value, what is allowed, what to try.

Every fault that a user can cause is a `FewerError`; the command line prints its one sentence and exits with
`exit_code`. Anything else is a defect of ours and keeps its traceback.
"""

from __future__ import annotations


class FewerError(Exception):
    """A fault with a sentence for the user. `exit_code` 1: the work failed."""

    exit_code = 1


class UsageError(FewerError, ValueError):
    """The request itself is wrong (unknown method, value out of range). `exit_code` 2."""

    exit_code = 2


class CheckpointError(FewerError):
    """A file is missing, damaged, hostile, of an unknown kind, or contradicts itself."""


class DownloadError(FewerError):
    """A download failed: no network, no disk space, wrong checksum. What arrived is kept and resumes."""


class NumericalError(FewerError):
    """Logits or hidden states are not finite; the message names the layer."""


class PoolExhausted(FewerError):
    """A cache's pool of fixed size has no page left for the next tokens; what it held, it still holds."""
