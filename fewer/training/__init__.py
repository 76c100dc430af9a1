"""Training: one loop, its losses, token blocks, and adapters on disk, for every method that fits something."""

from fewer.training.adapters import Adapter, Provenance, load_adapter, save_adapter
from fewer.training.data import TokenBlocks, sample_tokens
from fewer.training.losses import distillation, hidden_mse, next_token_loss
from fewer.training.trainer import ParameterGroup, StepRecord, Trainer, TrainerConfig

__all__ = [
    "Adapter",
    "ParameterGroup",
    "Provenance",
    "StepRecord",
    "TokenBlocks",
    "Trainer",
    "TrainerConfig",
    "distillation",
    "hidden_mse",
    "load_adapter",
    "next_token_loss",
    "sample_tokens",
    "save_adapter",
]
