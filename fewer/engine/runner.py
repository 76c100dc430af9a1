"""Runner: executes a Step the fastest exact way this device has; decoding strategies never see how."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from fewer.engine.single_token import SingleToken, supports
from fewer.engine.threads import Governor
from fewer.errors import NumericalError
from fewer.model.step import Output, Step
from fewer.model.transformer import Transformer
from fewer.slots import ContiguousCache, KVCache

PREFILL_CHUNK = {"cpu": 512, "cuda": 8192}


class Runner:
    def __init__(self, model: Transformer):
        self.model = model
        self.config = model.config
        self.device = model.device
        self.dtype = model.dtype
        self.governor = Governor(torch.get_num_threads() if self.device.type == "cpu" else 1)
        self.single = SingleToken(model) if supports(model) else None
        self.chunk = PREFILL_CHUNK.get(self.device.type, 512)

    @torch.inference_mode()
    def step(self, step: Step, cache: KVCache) -> Output:
        """Run one pass. Raises NumericalError, naming the layer, when the result is not finite."""
        output = self.model.forward(step, cache)
        if output.hidden is not None and not math.isfinite(float(output.hidden.sum())):
            self._explain(step, cache)
        return output

    @torch.inference_mode()
    def decode_one(self, token: int, position: int, cache: KVCache) -> Tensor:
        """One token of a single sequence, committed -> logits [1, V] float32."""
        if self.single is not None and getattr(cache, "contiguous", False):
            with self.governor:
                hidden = self.single.run(token, position, cast(ContiguousCache, cache))
                if math.isfinite(float(hidden.sum())):
                    return self.single.logits(hidden)
            cache.truncate(0, position)  # the general path below names the layer
        step = Step(
            tokens=torch.tensor([[token]], device=self.device),
            positions=torch.tensor([[position]], device=self.device),
            role="generated",
        )
        logits = self.step(step, cache).logits
        cache.commit([1])
        assert logits is not None
        return logits

    def _explain(self, step: Step, cache: KVCache) -> None:
        where = self.model.find_non_finite(step, cache)
        raise NumericalError(
            f"the model's output is not finite ({where}): the checkpoint may be damaged, or {self.dtype} too narrow "
            "for it: try --dtype float32"
        )
