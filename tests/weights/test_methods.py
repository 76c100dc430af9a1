"""Weight methods choose the formats that their pages promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fewer.errors import UsageError
from fewer.formats import DenseFormat, Int4Format, Int8Format, WeightFormat
from fewer.registry import methods, parse_spec

PROJECTION = "layers.0.attention.q.weight"
ENDS = ("embed.weight", "head.weight")
ROUTERS = ("layers.0.router.weight", "layers.1.shared_expert_gate.weight")


def made(spec: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The method that a spec names, as loading builds it."""
    choice = parse_spec("weights", spec)
    return choice.method.target(dtype) if choice.config is None else choice.method.target(dtype, choice.config)


def quantize(spec: str, name: str, columns: int = 128) -> WeightFormat:
    torch.manual_seed(0)
    return made(spec).quantize(name, torch.randn(8, columns))


@pytest.mark.parametrize("spec", ["dense", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [PROJECTION, *ENDS, *ROUTERS])
def test_dense_and_auto_keep_every_matrix_at_the_dtype(spec: str, dtype: torch.dtype, name: str) -> None:
    method, weight = made(spec, dtype), torch.randn(4, 6)
    stored = method.quantize(name, weight)
    assert method.reads == dtype
    assert isinstance(stored, DenseFormat)
    assert torch.equal(stored.weight, weight.to(dtype))


def test_only_auto_keeps_what_a_file_has_quantised() -> None:
    assert {name: made(name).keeps_file_format for name in ("auto", "dense", "int8", "int4")} == {
        "auto": True,
        "dense": False,
        "int8": False,
        "int4": False,
    }


@pytest.mark.parametrize("spec", ["int8", "int4"])
def test_rounding_starts_from_float32_and_needs_no_calibration(spec: str) -> None:
    assert made(spec).reads == torch.float32
    assert not made(spec).needs_calibration


@pytest.mark.parametrize("name", [PROJECTION, *ENDS])
def test_int8_has_one_scale_a_row(name: str) -> None:
    stored = quantize("int8", name)
    assert isinstance(stored, Int8Format)
    assert stored.group_size == 128


@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_takes_the_group_asked_for(group: int) -> None:
    stored = quantize(f"int4:group={group}", PROJECTION)
    assert isinstance(stored, Int4Format)
    assert stored.group_size == group
    assert isinstance(quantize("int4", PROJECTION), Int4Format)


@pytest.mark.parametrize(("head", "kind"), [("int8", Int8Format), ("int4", Int4Format), ("dense", DenseFormat)])
@pytest.mark.parametrize("name", ENDS)
def test_int4_stores_embedding_and_head_as_asked(name: str, head: str, kind: type[WeightFormat]) -> None:
    stored = quantize(f"int4:head={head}", name)
    assert isinstance(stored, kind)
    assert stored.compute_dtype == torch.bfloat16
    assert isinstance(quantize("int4", name), Int8Format)  # unless told otherwise


@pytest.mark.parametrize("spec", ["int8", "int4", "int4:head=int4"])
@pytest.mark.parametrize("name", ROUTERS)
def test_routers_stay_dense(spec: str, name: str) -> None:
    stored = quantize(spec, name)
    assert isinstance(stored, DenseFormat)
    assert stored.weight.dtype == torch.bfloat16


def test_a_group_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="group=48 is not allowed: choose one of 32, 64, 128"):
        parse_spec("weights", "int4:group=48")
    with pytest.raises(UsageError, match="use 32"):
        quantize("int4:group=128", PROJECTION, columns=96)


def test_only_rounding_is_registered_as_lossy() -> None:
    lossless = {entry.name: entry.lossless for entry in methods("weights")}
    assert lossless == lossless | {"dense": True, "auto": True, "int8": False, "int4": False}
