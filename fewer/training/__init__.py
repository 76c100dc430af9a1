"""Training: one loop, its losses and data, and adapters on disk, for every method that fits something."""

from fewer.training.adapters import Adapter, Provenance, load_adapter, save_adapter
from fewer.training.data import TokenBlocks, sample_tokens
from fewer.training.fitting import FittedModel, TrainingRun, TrainingText, fit, fit_to_file
from fewer.training.haystack import Haystack
from fewer.training.losses import distillation, hidden_mse, next_token_loss
from fewer.training.passkeys import PasskeyBatch, PasskeyBatches, PasskeyConfig
from fewer.training.trainer import ParameterGroup, StepRecord, Trainer, TrainerConfig

__all__ = [
    "Adapter",
    "FittedModel",
    "Haystack",
    "ParameterGroup",
    "PasskeyBatch",
    "PasskeyBatches",
    "PasskeyConfig",
    "Provenance",
    "StepRecord",
    "TokenBlocks",
    "Trainer",
    "TrainerConfig",
    "TrainingRun",
    "TrainingText",
    "distillation",
    "fit",
    "fit_to_file",
    "hidden_mse",
    "load_adapter",
    "next_token_loss",
    "sample_tokens",
    "save_adapter",
]
