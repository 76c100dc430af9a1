"""Fewer experts: one file a method (`fewer.slots.ExpertsMethod`)."""

from fewer.experts.resident import ResidentExperts

__all__ = ["ResidentExperts"]
