"""All experts stay in memory, in the format that the weights slot chose: the plain mixture of experts."""

from __future__ import annotations

from fewer.slots import method


@method("resident", slot="experts", lossless=True)
class ResidentExperts:
    """The network's own router and store (`fewer.model.experts`) are used as they are."""
