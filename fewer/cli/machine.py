"""What `fewer doctor` reports: facts of this machine, as plain values."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch

import fewer
from fewer.checkpoint import store
from fewer.cli.output import size
from fewer.evaluation.bandwidth import read_bandwidth
from fewer.evaluation.machine import cores, processor
from fewer.home import home
from fewer.kernels.native import Unavailable, library

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "tokenizers",
    "gguf",
    "huggingface_hub",
    "transformers",
    "llama-cpp-python",
    "typer",
)
LITTLE_MEMORY = 2.0  # GB available below which even small models are tight
LITTLE_SPACE = 1.0  # GB


def examine(measure_bandwidth: bool = True) -> dict[str, Any]:
    """Machine, versions, kernels, storage, and sentences of advice."""
    facts: dict[str, Any] = {
        "machine": _machine(),
        "versions": _versions(),
        "kernels": _kernels(),
        "storage": _storage(),
    }
    if measure_bandwidth:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        facts["machine"]["bandwidth_gb_per_second"] = read_bandwidth(device) / 1e9
    facts["advice"] = _advice(facts)
    return facts


def _machine() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    total, available = _memory()
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_gb": total,
        "memory_available_gb": available,
        "gpus": [f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB" for gpu in gpus],
    }


def _memory() -> tuple[float | None, float | None]:
    """(installed, available) in GB, where the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        return kilobytes["MemTotal"] * 1024 / 1e9, kilobytes["MemAvailable"] * 1024 / 1e9
    except (OSError, KeyError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, None
    except (AttributeError, ValueError, OSError):
        return None, None


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"fewer": fewer.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["cuda"] = torch.version.cuda
    return found


def _kernels() -> dict[str, Any]:
    """What runs the products: Triton on a GPU, otherwise PyTorch's packed CPU kernels."""
    on_gpu = torch.cuda.is_available()
    packed = {
        "int4": hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"),
        "int8": hasattr(torch.ops.aten, "_weight_int8pack_mm"),
    }
    return {
        "device": "cuda" if on_gpu else "cpu",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        **{
            name: "Triton" if on_gpu else "PyTorch's packed kernel" if has else "decoded, then dense"
            for name, has in packed.items()
        },
        "decoding_step": "Triton, in one CUDA graph" if on_gpu else _native(),
        "dense": "cuBLAS" if on_gpu else "oneDNN" if torch.backends.mkldnn.is_available() else "ATen",
        "cuda_graphs": on_gpu,
    }


def _native() -> str:
    """How a CPU runs one token."""
    code = library()
    return f"TorchScript: {code}" if isinstance(code, Unavailable) else "C, compiled for this processor"


def _storage() -> dict[str, Any]:
    folder = home()
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    return {
        "FEWER_HOME": str(folder),
        "free_gb": shutil.disk_usage(existing).free / 1e9,
        "installed": [f"{model.name} ({size(model.nbytes)})" for model in store.installed()],
    }


def _advice(facts: dict[str, Any]) -> list[str]:
    machine, advice = facts["machine"], []
    available = machine["memory_available_gb"]
    if available is not None and available < LITTLE_MEMORY:
        advice.append(f"only {available:.1f} GB of memory are available: close programs or use weights=int4")
    if facts["storage"]["free_gb"] < LITTLE_SPACE:
        advice.append("less than 1 GB is free for models: set FEWER_HOME to a folder on a larger disk")
    if machine["threads"] > machine["cores"]:
        advice.append(f"{machine['threads']} threads share {machine['cores']} cores: set --threads {machine['cores']}")
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        advice.append("there is an NVIDIA driver, but PyTorch sees no GPU: install a CUDA build of torch")
    if torch.cuda.is_available() and facts["versions"]["triton"] is None:
        advice.append("Triton is missing, so quantised matrices cannot use their GPU kernels: pip install triton")
    return advice
