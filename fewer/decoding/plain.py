"""Plain decoding: one target pass for each token.

The baseline of every other decoding method.
"""

from __future__ import annotations

from fewer.decoding.sampling import SamplingConfig
from fewer.registry import method
from fewer.slots import Drafter


@method("plain", slot="decoding", lossless=True)
class Plain:
    """A strategy that drafts nothing."""

    lossless = True

    def __init__(self, config: None = None, context: object = None):
        """Takes no settings and needs nothing from the model."""

    def drafter(self, sampling: SamplingConfig, row: int) -> Drafter | None:
        return None
