"""Fewer steps: drafters, the verifier, sampling and the generation loop."""

from fewer.decoding.draft_model import DraftModel, DraftModelConfig
from fewer.decoding.plain import Plain
from fewer.decoding.prompt_lookup import PromptLookup, PromptLookupConfig

__all__ = ["DraftModel", "DraftModelConfig", "Plain", "PromptLookup", "PromptLookupConfig"]
