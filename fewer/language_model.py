"""The facade: `load` a model by name with one choice for each slot, then generate, stream, or open a session."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fewer.checkpoint.checkpoint import Checkpoint
from fewer.checkpoint.open import open_checkpoint
from fewer.checkpoint.tokenizer import Tokenizer
from fewer.decoding.counts import Counts
from fewer.decoding.generate import TokenEvent, generate
from fewer.decoding.sampling import SamplingConfig
from fewer.decoding.stop_strings import StopStrings
from fewer.engine.collector import CollectorPause
from fewer.engine.loading import MatrixLoader, choose_device, choose_dtype
from fewer.engine.runner import Runner
from fewer.engine.session import Session
from fewer.errors import UsageError
from fewer.model.config import ModelConfig
from fewer.model.transformer import Transformer
from fewer.recipe import Recipe
from fewer.registry import Choice, Slot
from fewer.slots import KVCache

GREEDY = SamplingConfig()
Messages = Sequence[dict[str, str]]


@dataclass
class Generation:
    """One answer and what it took. Seconds are wall-clock; rates are tokens a second."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    finish_reason: str = "length"
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    kv_bytes: int = 0
    target_passes: int = 0  # after the prefill
    logprobs: list[float] | None = None
    counts: Counts = field(default_factory=Counts)  # of a batch: of all its answers together
    drafts: list[tuple[int, int, str]] = field(default_factory=list)  # tokens [start, stop) were guessed, and by what

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first, over the time after the first."""
        return (len(self.tokens) - 1) / self.decode_seconds if self.decode_seconds and len(self.tokens) > 1 else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens emitted for each target pass after the prefill."""
        return (len(self.tokens) - 1) / self.target_passes if self.target_passes else 1.0


class LanguageModel:
    """A loaded model with its recipe. Made by `load`."""

    def __init__(self, checkpoint: Checkpoint, transformer: Transformer, recipe: Recipe, context: int | None):
        self.checkpoint = checkpoint
        self.transformer = transformer
        self.recipe = recipe
        self.choices = _with_adapters(recipe.choices, checkpoint)
        integers = getattr(self.choices["weights"].config, "activations", "float") == "int8"
        self.runner = Runner(transformer, integers)
        self.context_length = min(context or transformer.config.context_length, transformer.config.context_length)
        self.load_seconds = 0.0
        self._tokenizer: Tokenizer | None = None
        self._strategy: Any = None

    @property
    def config(self) -> ModelConfig:
        return self.transformer.config

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            with CollectorPause():  # a vocabulary is a hundred thousand objects, all of them kept
                self._tokenizer = self.checkpoint.tokenizer()
        return self._tokenizer

    @property
    def weight_bytes(self) -> int:
        return self.transformer.nbytes

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        choice = self.choices["cache"]
        model = self.transformer
        settings = () if choice.config is None else (choice.config,)
        cache: KVCache = choice.method.target(model.config, batch, capacity, model.dtype, model.device, *settings)
        return cache

    def session(self, batch: int = 1, capacity: int | None = None) -> Session:
        """An empty batch of sequences; `capacity` tokens are allocated at once, more are added when needed."""
        return Session(
            self.runner, self.new_cache(batch, min(capacity or 512, self.context_length)), self.context_length
        )

    @property
    def strategy(self) -> Any:
        """The decoding strategy of the recipe, built on first use (a draft model is loaded then)."""
        if self._strategy is None:
            choice = self.choices["decoding"]
            self._strategy = choice.method.target(choice.config, self)
        return self._strategy

    def load_model(self, name: str) -> LanguageModel:
        """Another model on the same device and dtype: what a draft model is loaded with."""
        dtype = str(self.transformer.dtype).removeprefix("torch.")
        return load(name, dtype=dtype, device=str(self.transformer.device))

    def encode(self, prompt: str | Messages, raw: bool = False) -> list[int]:
        """A prompt as tokens: through the chat template as one user message, unless `raw` or already messages."""
        if isinstance(prompt, str):
            if not prompt.strip():
                raise UsageError("the prompt is empty: give some text")
            if raw:
                return self.tokenizer.encode(prompt)
            prompt = [{"role": "user", "content": prompt}]
        return self.tokenizer.chat(prompt)

    def events(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int = 256,
        sampling: SamplingConfig = GREEDY,
        logprobs: bool = False,
        session: Session | None = None,
        counts: Counts | None = None,
    ) -> Iterator[TokenEvent]:
        """Tokens as they come, for a batch of tokenised prompts; `counts` is filled meanwhile."""
        _check_max_tokens(max_tokens)
        if not prompts:
            raise UsageError("there is no prompt: give at least one")
        longest = max(len(prompt) for prompt in prompts)
        if session is None:
            session = self.session(len(prompts), longest + max_tokens + 1)
        held = max(session.lengths)
        if held + longest >= self.context_length and not session.cache.renumbers:
            raise UsageError(
                f"the prompt has {held + longest} tokens, but the model's context holds {self.context_length} with the "
                "answer: shorten the prompt"
            )
        stops = self.tokenizer.eos_tokens
        yield from generate(session, prompts, sampling, self.strategy, max_tokens, stops, logprobs, counts)

    def stream(
        self,
        prompt: str | Messages,
        raw: bool = False,
        max_tokens: int = 256,
        sampling: SamplingConfig = GREEDY,
        stop: Sequence[str] = (),
        result: Generation | None = None,
        logprobs: bool = False,
    ) -> Iterator[str]:
        """Text as it comes, never splitting a character; `result` is filled with the figures."""
        _check_max_tokens(max_tokens)
        result = result if result is not None else Generation()
        tokens = self.encode(prompt, raw)
        session = self.session(1, len(tokens) + max_tokens + 1)
        result.prompt_tokens = len(tokens)
        text, stops = self.tokenizer.stream(), StopStrings(stop)
        result.logprobs = [] if logprobs else None
        start = first = time.perf_counter()
        try:
            for event in self.events([tokens], max_tokens, sampling, logprobs, session, result.counts):
                if not result.tokens:
                    first = time.perf_counter()
                shown, taken = "", 0
                for token in event.tokens:
                    shown += stops.feed(text.feed(token))
                    taken += 1
                    if stops.found:  # what a draft brought behind it is not part of the answer
                        break
                if event.guessed:
                    place = len(result.tokens)
                    result.drafts.append((place, place + min(event.guessed, taken), event.drafter))
                result.tokens += event.tokens[:taken]
                if result.logprobs is not None and event.logprobs is not None:
                    result.logprobs += event.logprobs[:taken]
                result.text += shown
                result.finish_reason = "stop" if stops.found else event.finished or result.finish_reason
                if shown:
                    yield shown
                if stops.found:
                    return
            rest = stops.finish(text.finish())
            result.text += rest
            if rest:
                yield rest
        finally:  # also where the reader leaves early
            result.prefill_seconds, result.decode_seconds = first - start, time.perf_counter() - first
            result.kv_bytes, result.target_passes = session.cache.nbytes, session.passes

    def generate(
        self,
        prompt: str | Messages,
        raw: bool = False,
        max_tokens: int = 256,
        sampling: SamplingConfig = GREEDY,
        stop: Sequence[str] = (),
        logprobs: bool = False,
    ) -> Generation:
        """One answer, whole."""
        result = Generation()
        for _ in self.stream(prompt, raw, max_tokens, sampling, stop, result, logprobs):
            pass
        return result

    def generate_batch(
        self,
        prompts: Sequence[str],
        raw: bool = False,
        max_tokens: int = 256,
        sampling: SamplingConfig = GREEDY,
        completions: int = 1,
    ) -> list[Generation]:
        """Several prompts in one batch, each with as many `completions`, one prompt's after the other's. Each answer
        equals the one that the prompt would get alone (row r is sampled with seed + r). What prompts begin with in
        common is computed once by the caches that can (`paged`, `hydragen`)."""
        _check_max_tokens(max_tokens)
        if completions < 1:
            raise UsageError(f"completions is {completions}: ask for at least 1 answer to each prompt")
        if not prompts:
            return []
        encoded = [tokens for prompt in prompts for tokens in [self.encode(prompt, raw)] * completions]
        session = self.session(len(encoded), max(map(len, encoded)) + max_tokens + 1)
        counts = Counts()
        results = [Generation(prompt_tokens=len(tokens), counts=counts) for tokens in encoded]
        start = first = time.perf_counter()
        for event in self.events(encoded, max_tokens, sampling, session=session, counts=counts):
            first = first if any(result.tokens for result in results) else time.perf_counter()
            result = results[event.row]
            result.target_passes += bool(result.tokens)  # the first token is the prefill's
            result.tokens += event.tokens
            result.finish_reason = event.finished or result.finish_reason
        for result in results:
            result.text = self.tokenizer.decode(result.tokens)
            result.prefill_seconds, result.decode_seconds = first - start, time.perf_counter() - first
            result.kv_bytes = session.cache.nbytes
        return results

    def with_recipe(self, recipe: Recipe) -> LanguageModel:
        """The same weights under another cache or decoding method, sharing memory."""
        loaded = [(each.weights, each.experts, each.dtype) for each in (recipe, self.recipe)]
        if loaded[0] != loaded[1]:
            raise ValueError("with_recipe shares what was loaded: weights, experts and dtype must be the same")
        other = LanguageModel(self.checkpoint, self.transformer, recipe, self.context_length)
        other.runner, other._tokenizer, other.load_seconds = self.runner, self._tokenizer, self.load_seconds
        return other


def _with_adapters(choices: Mapping[Slot, Choice], checkpoint: Checkpoint) -> Mapping[Slot, Choice]:
    """The choices, with what was learnt for those that take it. Nothing of `training/` is imported for the others."""
    if all(choice.method.learnt_by is None for choice in choices.values()):
        return choices
    from fewer.training.adapter_store import with_adapters

    return with_adapters(choices, checkpoint)


def _check_max_tokens(max_tokens: int) -> None:
    if max_tokens < 1:
        raise UsageError(f"max_tokens is {max_tokens}: ask for at least 1 token")


def load(
    model: str | Path = "smollm2",
    weights: str = "auto",
    cache: str = "full",
    decoding: str = "plain",
    experts: str = "resident",
    dtype: str | None = None,
    device: str | None = None,
    context: int | None = None,
    recipe: Recipe | None = None,
    progress: Any = None,
    on_matrix: Callable[[int, int], None] | None = None,
    gradients: bool = False,
) -> LanguageModel:
    """Load a model: an alias, a folder, a .gguf file or a hub id. Specs are checked before anything is read.

    `progress` shows a download (`fewer.checkpoint.store.Progress`), `on_matrix(done, total)` the loading. `gradients`:
    a backward pass may go through the (frozen) weights, for methods that are fitted; decoding is a little slower.
    """
    if recipe is None:
        recipe = Recipe(weights=weights, cache=cache, decoding=decoding, experts=experts, dtype=dtype)
    chosen_device, chosen_dtype = choose_device(device), choose_dtype(recipe.dtype or dtype)
    if context is not None and context < 1:
        raise UsageError(f"context is {context}: ask for at least 1 token")
    start = time.perf_counter()
    with CollectorPause():
        checkpoint = open_checkpoint(model, progress)
    if context is not None and context < checkpoint.config.context_length:
        # LongRoPE and dynamic scaling choose their frequencies by the context that is to be reached.
        checkpoint.config = replace(checkpoint.config, context_length=context)
    choices = _with_adapters(recipe.choices, checkpoint)  # a missing adapter is told before the weights are read
    loader = MatrixLoader(checkpoint, choices["weights"], chosen_dtype, chosen_device, on_matrix)
    with torch.no_grad() if gradients else torch.inference_mode(), CollectorPause():
        transformer = loader.transformer(chosen_dtype, choices["experts"])
    loaded = LanguageModel(checkpoint, transformer, recipe, context)
    loaded.load_seconds = time.perf_counter() - start
    return loaded


def compress(
    model: str | Path,
    folder: Path,
    recipe: Recipe,
    device: str | None = None,
    progress: Any = None,
    on_matrix: Callable[[int, int], None] | None = None,
) -> int:
    """Write `model` with the recipe's weights as a folder that `load` reads back bit for bit; returns its bytes."""
    from fewer.checkpoint.export import write_folder

    checkpoint = open_checkpoint(model, progress)
    dtype = choose_dtype(recipe.dtype)
    weights = _with_adapters({"weights": recipe.choices["weights"]}, checkpoint)["weights"]
    loader = MatrixLoader(checkpoint, weights, dtype, choose_device(device), on_matrix)
    names = checkpoint.names()
    matrices = [name for name in names if len(checkpoint[name].shape) == 2]
    vectors = [name for name in names if len(checkpoint[name].shape) == 1]
    return write_folder(
        folder,
        checkpoint.config,
        ((name, loader.matrix(name)) for name in matrices),
        ((name, checkpoint[name].dense(torch.float32)) for name in vectors),
        checkpoint.tokenizer(),
        {"recipe": replace(recipe, cache="full", decoding="plain").to_mapping(), "source": checkpoint.fingerprint()},
    )
