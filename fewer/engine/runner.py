"""Runner: executes a Step the fastest exact way this device has; decoding strategies never see how."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fewer.engine.collector import CollectorPause
from fewer.engine.native import NativeDecoder
from fewer.engine.native import supports as native_supports
from fewer.engine.run_ahead import NotFinite
from fewer.engine.single_token import SingleToken
from fewer.engine.single_token import supports as scripted_supports
from fewer.engine.threads import Governor
from fewer.errors import NumericalError, UsageError
from fewer.kernels.native import Unavailable, library
from fewer.model.step import Output, Step
from fewer.model.transformer import Transformer
from fewer.slots import Capture, CapturedCache, ContiguousCache, CorrectedCache, KVCache

if TYPE_CHECKING:
    from fewer.engine.cuda import CudaDecoder

PREFILL_CHUNK = {"cpu": 512, "cuda": 8192}


class Runner:
    def __init__(self, model: Transformer, integers: bool = False):
        """`integers`: the CPU's fast path rounds what meets 4-bit weights to 8 bits. Raises UsageError where that path
        does not run."""
        self.model = model
        self.config = model.config
        self.device = model.device
        self.dtype = model.dtype
        self.governor = Governor(torch.get_num_threads() if self.device.type == "cpu" else 1)
        self.single = _single_token(model, integers)
        self.cuda = _cuda_decoder(model)
        self.chunk = PREFILL_CHUNK.get(self.device.type, 512)

    @torch.inference_mode()
    def step(self, step: Step, cache: KVCache) -> Output:
        """Run one pass. Raises NumericalError, naming the layer, when the result is not finite."""
        if self.cuda is not None and _is_one_token(step):
            capture = self.cuda.capture(step, cache)
            if capture is not None:
                return self._decode_rows(self.cuda, step, cache, capture)
        native = self.single
        width = step.positions.shape[1]
        if isinstance(native, NativeDecoder) and native.takes(step) and native.accepts(cache, width, step.role):
            with self._short_step():
                output = native.run_step(step, cast(Any, cache))
        else:
            output = self.model.forward(step, cache)
        if output.logits is not None and not math.isfinite(float(output.logits.sum())):
            self._explain(step, cache)
        return output

    @torch.inference_mode()
    def decode_one(self, token: int, position: int, cache: KVCache) -> Tensor:
        """One token of a single sequence, committed -> logits [1, V] float32."""
        if self.single is not None and self.single.accepts(cache):
            with self._short_step():
                found = self.single.run(token, position, cast(Any, cache))
            if math.isfinite(float(found.sum())):
                return found
            cache.truncate(0, position)  # the general path below names the layer
        if self.cuda is not None and self.cuda.accepts(cache, 1):
            contiguous = cast(ContiguousCache, cache)
            row = self.cuda.run([token], [position], contiguous.contiguous_capture())
            if self.cuda.is_finite(1):
                contiguous.advance_one(position)
                return row.clone()
        step = Step(
            tokens=torch.tensor([[token]], device=self.device),
            positions=torch.tensor([[position]], device=self.device),
            role="generated",
        )
        logits = self.step(step, cache).logits
        cache.commit([1])
        assert logits is not None
        return logits

    def fast_room(self, cache: KVCache) -> int | None:
        """How many tokens `greedy` may take over this cache; None: as many as fit."""
        if self.cuda is not None:
            ahead = self.cuda.ahead(cache)
            return None if ahead is None else ahead.room
        return 0 if self.single is None else self.single.room(cache)

    def has_fast_path(self, cache: KVCache) -> bool:
        """Whether `greedy` can run over this cache of one row."""
        if self.cuda is not None:
            corrected = isinstance(cache, CorrectedCache) and cache.before_due(0) is not None
            return self.cuda.ahead(cache) is not None or (isinstance(cache, CapturedCache) and not corrected)
        return self.single is not None and self.single.accepts(cache)

    @torch.inference_mode()
    def greedy(self, token: int, position: int, cache: KVCache, count: int) -> Iterator[int]:
        """Feed `token` and then each most likely token of a single sequence, `count` times; yields those tokens. The
        cache must have (contiguous) room for `count` more, and `has_fast_path` hold. Raises NumericalError."""
        end = position + count
        if self.cuda is not None:
            tokens = self._greedy_on_cuda(self.cuda, token, position, cache, count)
        else:
            tokens = self._greedy_on_cpu(token, position, cache, count)
        for following in tokens:
            position, token = position + 1, following
            yield following
        while position < end:  # the general path's turn; where logits are not finite it names the layer
            token = int(self.decode_one(token, position, cache).argmax())
            position += 1
            yield token

    def _greedy_on_cuda(
        self, decoder: CudaDecoder, token: int, position: int, cache: KVCache, count: int
    ) -> Iterator[int]:
        try:
            yield from decoder.greedy(token, position, cache, count)
        except NotFinite as fault:
            tokens = None if fault.step.tokens is None else fault.step.tokens.to(self.device)
            self._explain(replace(fault.step, tokens=tokens), cache)

    def _greedy_on_cpu(self, token: int, position: int, cache: KVCache, count: int) -> Iterator[int]:
        """Ends early when logits are not finite; what that step cached is taken back."""
        assert self.single is not None
        for at in range(position, position + count):
            with self._short_step():
                best = self.single.most_likely(token, at, cast(Any, cache))
            if best is None:
                cache.truncate(0, at)
                return
            token = best
            yield token

    @contextmanager
    def _short_step(self) -> Iterator[None]:
        """A step may make hundreds of short-lived views, enough for Python to look for cyclic garbage several times. By
        its end they are gone, and there is nothing to look for: so the collector waits."""
        with CollectorPause(), self.governor:
            yield

    def _decode_rows(self, decoder: CudaDecoder, step: Step, cache: KVCache, capture: Capture) -> Output:
        """One token in each row, which the cache has placed, left tentative like every step's."""
        assert step.tokens is not None
        logits = decoder.run(step.tokens[:, 0].tolist(), cache.lengths, capture)
        if not decoder.is_finite(len(step.tokens)):
            self._explain(step, cache)
        return Output(logits.clone())

    def _explain(self, step: Step, cache: KVCache) -> None:
        where = self.model.find_non_finite(step, cache)
        raise NumericalError(
            f"the model's output is not finite ({where}): the checkpoint may be damaged, or {self.dtype} too narrow "
            "for it: try --dtype float32"
        )


def _is_one_token(step: Step) -> bool:
    """One generated token a row, and nothing asked for but its logits."""
    return (
        step.positions.shape[1] == 1
        and step.tokens is not None
        and step.mask == "causal"
        and step.logits == "last"
        and not step.hidden
        and step.layer_plan is None
        and not step.taps
    )


def _single_token(model: Transformer, integers: bool) -> SingleToken | NativeDecoder | None:
    if native_supports(model):
        return NativeDecoder(model, integers)
    if integers:
        reason = "this model's kind of layers" if model.device.type == "cpu" else f"a model on {model.device}"
        if isinstance(library(), Unavailable):
            reason = f"this machine ({library()})"
        raise UsageError(
            f"activations=int8 is computed by the CPU's decoding step in C, which is not made for {reason}: use "
            "activations=float"
        )
    return SingleToken(model) if scripted_supports(model) else None


def _cuda_decoder(model: Transformer) -> CudaDecoder | None:
    if model.device.type != "cuda":
        return None
    from fewer.engine import cuda  # Triton is imported only where there is a GPU

    return cuda.CudaDecoder(model) if cuda.supports(model) else None
