"""Draft model: a small model of the same vocabulary guesses the next few tokens.

Papers: Fast Inference from Transformers via Speculative Decoding, arXiv 2211.17192; Accelerating Large Language Model
Decoding with Speculative Sampling, arXiv 2302.01318. Differs from them: under greedy decoding the draft is greedy too,
and its chain is verified as a deterministic one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from fewer.decoding import tree
from fewer.decoding.sampling import DRAFT_STREAM, Sampler, SamplingConfig, argmax, penalise, warp
from fewer.engine.session import Session
from fewer.errors import UsageError
from fewer.model.config import ModelConfig
from fewer.registry import method
from fewer.slots import Drafter, DraftTree

PROBED_TOKENS = 2000  # ids whose spelling is compared between the two vocabularies


@dataclass(frozen=True)
class DraftModelConfig:
    model: str = ""  # an alias, a folder, a .gguf file or a hub id
    tokens: int = 5  # guessed tokens a round (gamma)

    def __post_init__(self) -> None:
        if not self.model:
            raise UsageError(
                "draft-model: no model is named: write draft-model:model=NAME, a smaller model of one family"
            )
        if not 1 <= self.tokens <= 63:
            raise UsageError(f"draft-model: tokens={self.tokens} is out of range: use 1 to 63")


class Spelling(Protocol):
    """What is asked of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    def piece(self, token: int) -> bytes: ...


class Network(Protocol):
    @property
    def config(self) -> ModelConfig: ...


class Model(Protocol):
    """What is asked of a language model, target or draft."""

    @property
    def tokenizer(self) -> Spelling: ...

    @property
    def transformer(self) -> Network: ...

    def session(self, batch: int = 1) -> Session: ...


class Context(Model, Protocol):
    """The target, which can also load another model like itself."""

    def load_model(self, name: str) -> Model: ...


@method("draft-model", slot="decoding", paper="2211.17192", lossless=True, config=DraftModelConfig)
class DraftModel:
    """The strategy: the draft's weights, and one session of its own for each row."""

    lossless = True

    def __init__(self, config: DraftModelConfig, context: Context):
        self.config = config
        self.model = context.load_model(config.model)
        check_vocabulary(config.model, self.model.tokenizer, context.tokenizer)
        self.vocab_size = context.transformer.config.vocab_size

    def drafter(self, sampling: SamplingConfig, row: int) -> Drafter | None:
        sampler = Sampler(sampling, row, stream=DRAFT_STREAM)
        return ChainDrafter(self.model.session(1), sampler, self.config.tokens, self.vocab_size)


def check_vocabulary(name: str, draft: Spelling, target: Spelling) -> None:
    """Raise UsageError unless every token means the same to both. Unused rows at the end may differ in number."""
    size = target.vocab_size
    if draft.vocab_size != size:
        raise UsageError(
            f"the draft model '{name}' has {draft.vocab_size} tokens in its vocabulary but the target has {size}: "
            "choose a draft of the target's family"
        )
    step = max(1, size // PROBED_TOKENS)
    for token in range(0, size, step):
        if draft.piece(token) != target.piece(token):
            raise UsageError(
                f"the draft model '{name}' has another vocabulary than the target (token {token} is "
                f"{draft.piece(token)!r}, not {target.piece(token)!r}): choose a draft of the target's family"
            )


class ChainDrafter:
    """Drafts a chain with a model of its own. Its session holds the context up to the last token that both accepted."""

    lossless = True

    def __init__(self, session: Session, sampler: Sampler, tokens: int, vocab_size: int):
        self.session, self.sampler, self.tokens, self.vocab_size = session, sampler, tokens, vocab_size
        self.fed: list[int] = []  # guesses of this round that the session holds
        self.agreed = 0  # tokens of the context that the session holds

    def start(self, prompt: Sequence[int]) -> None:
        """Nothing is read before it is needed: the first `propose` prefills the prompt."""
        self.session.rollback([0])
        self.fed, self.agreed = [], 0

    def propose(self, context: Sequence[int], limit: int) -> DraftTree:
        room = self.session.context_length - len(context)  # the last guess is not fed
        count = min(limit, self.tokens, room)
        if count < 1:
            return tree.root(context[-1])
        missing = context[self.agreed :]
        if max(missing) >= self.session.config.vocab_size:  # one of the target's unused rows, which the draft lacks
            return tree.root(context[-1])
        logits = self.session.decode(missing) if len(missing) == 1 else self.session.prefill([missing])
        self.agreed, self.fed = len(context), []
        guesses: list[int] = []
        laws: list[Tensor] = []
        while True:
            token, law = self._guess(logits[0], [*context, *guesses] if self.sampler.config.reads_history else ())
            guesses.append(token)
            laws.append(law)
            if len(guesses) == count:
                break
            logits = self.session.decode([token])
            self.fed.append(token)
        draft = tree.chain(context[-1], guesses)
        if not self.sampler.greedy:
            draft.origin = "iid"
            draft.probabilities = torch.stack([*laws, torch.zeros_like(laws[0])])
        return draft

    def _guess(self, logits: Tensor, history: Sequence[int]) -> tuple[int, Tensor]:
        """A token that the target knows, and the law [V of the target] that it was drawn from."""
        logits = logits[: self.vocab_size]
        config = self.sampler.config
        if self.sampler.greedy:
            return int(argmax(penalise(logits, history, config.repetition_penalty))), logits
        law = warp(logits, config, history)
        return self.sampler.draw(law), functional.pad(law, (0, self.vocab_size - law.shape[-1]))

    def accept(self, tokens: Sequence[int]) -> None:
        """Keep the guesses that became text, forget the others."""
        kept = 0
        while kept < min(len(self.fed), len(tokens)) and self.fed[kept] == tokens[kept]:
            kept += 1
        if kept < len(self.fed):
            self.session.rollback([self.agreed + kept])
        self.agreed, self.fed = self.agreed + kept, []
