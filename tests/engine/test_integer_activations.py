"""Products of 4-bit weights and 8-bit activations in the CPU's C step: the right numbers, the same ones for a chain."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fewer.engine import runner as runners
from fewer.engine.native import NativeDecoder
from fewer.engine.runner import Runner
from fewer.engine.session import Session
from fewer.errors import UsageError
from fewer.formats import DenseFormat, Int4Format, Int8Format, WeightFormat
from fewer.kernels.native import Unavailable, library
from fewer.language_model import load
from fewer.model.config import ModelConfig
from fewer.slots import DraftTree
from tests.random_model import config_of, new_session, random_tokens, random_transformer
from tests.tiny_model import write_model

pytestmark = pytest.mark.skipif(isinstance(library(), Unavailable), reason="there is no C compiler")
SIZES = {"hidden_size": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "intermediate_size": 160, "layers": 2}
CONFIG = config_of(**SIZES | {"vocab_size": 100})


def grouped_int8(weight: Tensor) -> Int8Format:
    """As a GGUF file has it: a scale for 32 columns, stored as two 4-bit halves."""
    groups = weight.unflatten(1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    codes = (groups / scale).round().clamp(-127, 127).flatten(1).to(torch.int8)
    return Int8Format.from_codes(codes, scale[..., 0])


def four_bits(name: str, weight: Tensor) -> WeightFormat:
    if name in ("embed.weight", "head.weight"):
        return grouped_int8(weight)
    return Int4Format.from_dense(weight, 64 if weight.shape[1] % 64 == 0 else 32)


class Rounding(DenseFormat):
    """What 4-bit weights stand for, times x as it is rounded: s·q for 32 numbers."""

    def matmul(self, x: Tensor) -> Tensor:
        groups = x.float().unflatten(-1, (-1, 32))
        scale = groups.abs().amax(-1, keepdim=True) / 127
        rounded = (groups / scale.masked_fill(scale == 0, 1)).round() * scale
        return functional.linear(rounded.flatten(-2), self.weight)


def rounding(name: str, weight: Tensor) -> WeightFormat:
    return Rounding(four_bits(name, weight).dequantize())


def sessions(config: ModelConfig) -> tuple[Session, Session]:
    """Integers in C, and the same numbers in PyTorch's general path."""
    ours = Runner(random_transformer(config, quantize=four_bits, spread=1.0), integers=True)
    theirs = Runner(random_transformer(config, quantize=rounding, spread=1.0))
    assert isinstance(ours.single, NativeDecoder)
    theirs.single = None
    return new_session(ours.model, runner=ours), new_session(theirs.model, runner=theirs)


@pytest.mark.parametrize("tokens", [1, 3, 6, 7, 20])
def test_the_numbers_are_those_of_rounded_inputs(tokens: int) -> None:
    ours, theirs = sessions(CONFIG)
    tree = DraftTree(random_tokens(tokens, vocab_size=100), list(range(-1, tokens - 1)))
    (found,), (wanted,) = ours.verify([tree]), theirs.verify([tree])
    assert found is not None and wanted is not None
    # A number that lies between two codes may be rounded either way.
    assert (found - wanted).norm() <= 3e-3 * wanted.norm()


def test_they_are_near_those_of_floats() -> None:
    model = random_transformer(CONFIG, quantize=four_bits, spread=1.0)
    integers, floats = (new_session(model, runner=Runner(model, integers)) for integers in (True, False))
    for token in random_tokens(20, vocab_size=100):
        found, wanted = integers.decode([token]), floats.decode([token])
        assert 0 < (found - wanted).norm() <= 0.03 * wanted.norm()


def test_verifying_a_chain_gives_the_bits_of_plain_decoding() -> None:
    model = random_transformer(CONFIG, quantize=four_bits, spread=1.0)
    runner = Runner(model, integers=True)
    together, apart = new_session(model, runner=runner), new_session(model, runner=runner)
    tokens = random_tokens(17, vocab_size=100)
    (rows,) = together.verify([DraftTree(tokens, list(range(-1, 16)))])
    assert rows is not None
    for row, token in zip(rows, tokens, strict=True):
        assert torch.equal(apart.decode([token])[0], row)


def test_a_machine_without_the_step_in_c_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "native_supports", lambda model: False)
    with pytest.raises(UsageError, match="activations=int8 is computed by the CPU's decoding step in C"):
        Runner(random_transformer(CONFIG, quantize=four_bits), integers=True)


@pytest.mark.parametrize("weights", ["auto:activations=int8", "int4:activations=int8", "int4"])
def test_a_recipe_asks_for_them(weights: str, tmp_path: Path) -> None:
    decoder = load(write_model(tmp_path / "model"), weights=weights, device="cpu").runner.single
    assert isinstance(decoder, NativeDecoder)
    assert decoder.integers == ("activations=int8" in weights)
