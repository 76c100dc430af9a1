"""Fewer steps: drafters, the verifier, sampling and the generation loop."""

from fewer.decoding.aded import Aded, AdedConfig
from fewer.decoding.aggressive import Aggressive, AggressiveConfig
from fewer.decoding.aggressive_plus import AggressivePlus, AggressivePlusConfig
from fewer.decoding.chimera import Chimera, ChimeraConfig
from fewer.decoding.draft_model import DraftModel, DraftModelConfig
from fewer.decoding.eagle import Eagle, EagleConfig
from fewer.decoding.medusa import Medusa, MedusaConfig
from fewer.decoding.plain import Plain
from fewer.decoding.prompt_lookup import PromptLookup, PromptLookupConfig
from fewer.decoding.rest import Rest, RestConfig
from fewer.decoding.trigram_table import TrigramTable, build_table, load_table

__all__ = [
    "Aded",
    "AdedConfig",
    "Aggressive",
    "AggressiveConfig",
    "AggressivePlus",
    "AggressivePlusConfig",
    "Chimera",
    "ChimeraConfig",
    "DraftModel",
    "DraftModelConfig",
    "Eagle",
    "EagleConfig",
    "Medusa",
    "MedusaConfig",
    "Plain",
    "PromptLookup",
    "PromptLookupConfig",
    "Rest",
    "RestConfig",
    "TrigramTable",
    "build_table",
    "load_table",
]
