"""TorchScript for chains of small operations on the CPU: no Python between them, and no compiler needed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def scripted(function: Function) -> Function:
    """The function as TorchScript. PyTorch has deprecated it and may drop it: then the plain function serves."""
    script = getattr(torch.jit, "script", None)
    if script is None:
        return function
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return cast(Function, script(function))
