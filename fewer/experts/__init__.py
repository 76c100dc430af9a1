"""Fewer experts: one file a method (`fewer.slots.Router`, `fewer.slots.ExpertStore`)."""

from fewer.experts.resident import ResidentExperts

__all__ = ["ResidentExperts"]
