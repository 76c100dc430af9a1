"""What drafters that are trained on a target's hidden states use of it as it is: its embeddings, and its head over the
tokens that the drafter may guess.

A head of 49,152 rows costs a small model as much as several layers, and nearly all of a text is written with a few
thousand tokens. So a drafter learns with a vocabulary: the most frequent tokens of the text it was trained on
(as FR-Spec, arXiv 2502.14856, and EAGLE-3 do). Others are never guessed, and verified as ever.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fewer.formats import DenseFormat, Int8Format, WeightFormat
from fewer.model.transformer import Transformer


class FrozenTarget:
    def __init__(self, model: Transformer, vocabulary: Tensor | None = None, training: bool = False):
        """`vocabulary` [V'] int64: the tokens that are guessed; None: all. For drafting on a CPU their rows of the head
        are rounded to 8 bits (unless the model computes in float32), for `training` they are dense."""
        self.model, self.config = model, model.config
        self.device, self.dtype = model.device, model.dtype
        self.vocabulary = None if vocabulary is None else vocabulary.to(self.device)
        self.head = model.head
        if self.vocabulary is not None:
            self.head = self._rows(self.vocabulary, self.is_narrow and not training)

    @property
    def is_narrow(self) -> bool:
        """Whether what drafts beside it is rounded to 8 bits."""
        return self.device.type == "cpu" and self.dtype != torch.float32

    @property
    def classes(self) -> int:
        """V': how many tokens may be guessed."""
        return self.head.shape[0]

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [..] -> what the target's first layer is given [.., d] float32."""
        rows = self.model.embed.rows(tokens)
        return rows if self.config.embedding_scale is None else rows * self.config.embedding_scale

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [.., d] -> the target's logits of the tokens that may be guessed [.., V'] float32."""
        return self.scaled(self.head.matmul(hidden.to(self.dtype)).float())

    def scaled(self, logits: Tensor) -> Tensor:
        """What the target makes of its head's product."""
        if self.config.logit_scale != 1.0:
            logits = logits * self.config.logit_scale
        if self.config.logit_softcap is not None:
            logits = torch.tanh(logits / self.config.logit_softcap) * self.config.logit_softcap
        return logits

    def tokens(self, classes: Tensor) -> Tensor:
        """Numbers of classes [..] -> tokens [..]."""
        return classes if self.vocabulary is None else self.vocabulary[classes]

    def class_of(self) -> Tensor:
        """[V] int64: each token's class, -1 where it is never guessed."""
        size = self.config.vocab_size
        if self.vocabulary is None:
            return torch.arange(size, device=self.device)
        table = torch.full((size,), -1, device=self.device)
        table[self.vocabulary] = torch.arange(len(self.vocabulary), device=self.device)
        return table

    def _rows(self, vocabulary: Tensor, narrow: bool) -> WeightFormat:
        weight = self.model.head.rows(vocabulary)
        return Int8Format.from_dense(weight) if narrow else DenseFormat(weight.to(self.dtype))


def frequent_tokens(texts: Iterable[Sequence[int]], count: int, vocab_size: int) -> Tensor | None:
    """The `count` most frequent tokens, ascending [count] int64, filled up with the first ones that the texts lack;
    None where that is all of them, or `count` is 0."""
    if not 0 < count < vocab_size:
        return None
    counted = Counter(token for text in texts for token in text)
    order = sorted(counted, key=lambda token: (-counted[token], token))[:count]
    missing = (token for token in range(vocab_size) if token not in counted)
    order += [token for token, _ in zip(missing, range(count - len(order)), strict=False)]
    return torch.tensor(sorted(order))
