"""Several recipes on one model, in one process, in turn (A B C A B C …), against the uncompressed model.

Quality comes first and warms everything up: the uncompressed model writes a text after each prompt, and every recipe
reads it through its decode path. Then each round reads the memory bandwidth and times every recipe on the same prompts.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import cycle, islice
from typing import Any

import torch

from fewer.errors import FewerError, UsageError
from fewer.evaluation.bandwidth import BandwidthProbe
from fewer.evaluation.comparison import Comparison, Quality, Round, Row, Settings, unique
from fewer.evaluation.divergence import Divergence, Reference, divergence, reference
from fewer.evaluation.machine import machine
from fewer.evaluation.perplexity import perplexity
from fewer.evaluation.prompts import built_in_prompts, repeat_to
from fewer.evaluation.speed import Run, decode_rate, prefill_seconds, read_rate, run, run_batch, tokens_a_pass
from fewer.language_model import LanguageModel, load
from fewer.recipe import Recipe

OnProgress = Callable[[str, int, int], None]  # what is being done, how much of it, of how much
UNCOMPRESSED = Recipe(weights="dense")
DEFAULT = Settings()
WARM_UP = 8  # tokens
OWN_TEXT = "the prompts, and what the uncompressed model writes after them"


def compare(
    model: str,
    recipes: Sequence[Recipe],
    settings: Settings = DEFAULT,
    prompts: Sequence[str] | None = None,
    text: str | None = None,
    text_name: str = "the given text",
    on_progress: OnProgress | None = None,
    progress: Any = None,
) -> Comparison:
    """Measure every recipe. `prompts` default to the built-in ones, `text` (for perplexity) to the model's own.

    A recipe that fails becomes a row that says why. KeyboardInterrupt after the first whole round ends the measuring,
    and the result says so; before, it is raised. Raises UsageError where nothing can be measured.
    """
    if not recipes:
        raise UsageError("no recipe was given: name at least one")
    _check(settings)
    started, start = datetime.now(UTC), time.perf_counter()
    bench = _Bench(model, settings, on_progress or (lambda label, done, total: None), progress)
    rows = [Row(recipe) for recipe in unique(recipes)]
    result = bench.prepare(rows, prompts, text, text_name)
    result.started = started.isoformat(timespec="seconds")
    bench.rate_quality(rows, text)
    try:
        bench.run_rounds(result)
    except KeyboardInterrupt:
        if not result.rounds:
            raise
        result.interrupted = True
    result.seconds = time.perf_counter() - start
    return result


@dataclass
class _Bench:
    """Loaded models and encoded prompts of one comparison."""

    name: str
    settings: Settings
    on_progress: OnProgress
    progress: Any = None
    models: dict[Recipe, LanguageModel] = field(default_factory=dict)  # one a row that loaded
    prompts: list[list[int]] = field(default_factory=list)
    long_prompt: list[int] = field(default_factory=list)
    references: list[Reference] = field(default_factory=list)

    def prepare(
        self, rows: Sequence[Row], prompts: Sequence[str] | None, text: str | None, text_name: str
    ) -> Comparison:
        """Load the uncompressed model and let it write; then load what the rows need, each set of weights once."""
        failure, shared = None, dict[Recipe, LanguageModel]()
        key = _weights_of(UNCOMPRESSED)
        try:
            dense = shared[key] = self._load(key)
        except FewerError:
            raise  # no such model, a damaged file, an unknown device: no recipe could do better
        except Exception as fault:  # it does not fit, but compressed ones may
            failure, dense = reason(fault), None
        if dense is not None:
            self._encode(dense, prompts)
            try:
                self._write_references(dense)
            except Exception as fault:
                failure = reason(fault)
            if all(_weights_of(row.recipe) != key for row in rows):
                del shared[key]  # nobody else needs its memory
        for row in rows:
            self._load_row(row, shared)
        models = [self.models[row.recipe] for row in rows if row.recipe in self.models]
        if not models:
            raise FewerError(rows[0].failure or "nothing could be loaded")
        first = models[0]
        if dense is None:
            self._encode(first, prompts)
        config = first.config
        return Comparison(
            model=self.name,
            fingerprint=first.checkpoint.fingerprint(),
            architecture={
                "architecture": config.architecture,
                "layers": config.layers,
                "hidden_size": config.hidden_size,
                "vocabulary": config.vocab_size,
                "context": first.context_length,
            },
            machine=machine(first.transformer.device),
            settings=self.settings,
            prompts=len(self.prompts),
            prompt_tokens=len(self.long_prompt),
            text=text_name if text is not None else OWN_TEXT,
            rows=list(rows),
            reference_failure=failure,
        )

    def rate_quality(self, rows: Sequence[Row], text: str | None) -> None:
        """Fill each row's quality. A lossless decoding method cannot change it, so such rows share it."""
        known: dict[Recipe, Quality] = {}
        for index, row in enumerate(rows):
            self.on_progress("quality", index, len(rows))
            model = self.models.get(row.recipe)
            if model is None:
                continue
            if not model.strategy.lossless:
                row.quality_note = "the decoding method chooses other tokens, which a forced text does not show"
                continue
            key = replace(row.recipe, decoding="plain", name=None)
            with _Attempt(row):
                if key not in known:
                    known[key] = self._quality(model, text)
                row.quality = known[key]
        self.on_progress("quality", len(rows), len(rows))

    def run_rounds(self, result: Comparison) -> None:
        """Fill the rows' rounds, one whole round at a time."""
        settings = self.settings
        for row in result.rows:  # the first passes of a path are slow: kernels, graphs, threads
            if row.failure is None:
                with _Attempt(row):
                    run(self.models[row.recipe], self.prompts[0], WARM_UP)
        probe = BandwidthProbe(next(iter(self.models.values())).transformer.device)
        for number in range(settings.rounds):
            label = f"round {number + 1} of {settings.rounds}"
            result.bandwidths.append(probe.measure())
            done: list[tuple[Row, Round]] = []
            for index, row in enumerate(result.rows):
                self.on_progress(label, index, len(result.rows))
                if row.failure is None:
                    with _Attempt(row):
                        done.append((row, self._round(row)))
            for row, measured in done:
                row.rounds.append(measured)
            self.on_progress(label, len(result.rows), len(result.rows))
        result.bandwidths.append(probe.measure())

    def _round(self, row: Row) -> Round:
        model = self.models[row.recipe]
        seconds, row.kv_bytes = prefill_seconds(model, self.long_prompt)
        runs = self._runs(model)
        if self.settings.batch > 1:
            row.kv_bytes = max(each.kv_bytes for each in runs)
        return Round(
            first_seconds=statistics.median(each.first_seconds for each in runs),
            prefill_rate=len(self.long_prompt) / seconds,
            decode_rate=decode_rate(runs),
            read_rate=read_rate(runs),
            tokens_per_pass=tokens_a_pass(runs),
        )

    def _runs(self, model: LanguageModel) -> list[Run]:
        """Answers to all prompts, one after the other or a batch at a time."""
        batch, most = self.settings.batch, self.settings.max_tokens
        if batch == 1:
            return [run(model, prompt, most) for prompt in self.prompts]
        whole = -(-len(self.prompts) // batch) * batch
        again = list(islice(cycle(self.prompts), whole))
        return [run_batch(model, again[first : first + batch], most) for first in range(0, whole, batch)]

    def _quality(self, model: LanguageModel, text: str | None) -> Quality:
        total = sum((divergence(model, each) for each in self.references), Divergence())
        known = bool(self.references)
        kl, unchanged = (total.kl, total.agreement) if known else (None, None)
        if text is None:
            return Quality(total.perplexity if known else float("nan"), total.scored, kl, unchanged, total.tokens)
        window = min(self.settings.window, model.context_length)
        scored = perplexity(model, text, window, limit=self.settings.text_tokens, decode_path=True)
        return Quality(scored.perplexity, scored.tokens, kl, unchanged, total.tokens)

    def _load(self, recipe: Recipe) -> LanguageModel:
        def on_matrix(done: int, total: int) -> None:
            self.on_progress(f"loading {recipe}", done, total)

        settings = self.settings
        return load(
            self.name,
            recipe=recipe,
            dtype=settings.dtype,
            device=settings.device,
            context=settings.context,
            progress=self.progress,
            on_matrix=on_matrix,
        )

    def _load_row(self, row: Row, shared: dict[Recipe, LanguageModel]) -> None:
        key = _weights_of(row.recipe)
        with _Attempt(row):
            if key not in shared:
                shared[key] = self._load(key)
            model = shared[key].with_recipe(row.recipe)
            row.weight_bytes = model.weight_bytes
            _ = model.strategy  # a draft model is loaded here
            self.models[row.recipe] = model

    def _write_references(self, dense: LanguageModel) -> None:
        stops = dense.tokenizer.eos_tokens
        for index, prompt in enumerate(self.prompts):
            self.on_progress("text of the uncompressed model", index, len(self.prompts))
            self.references.append(reference(dense, prompt, self.settings.max_tokens, stops))
        self.on_progress("text of the uncompressed model", len(self.prompts), len(self.prompts))

    def _encode(self, model: LanguageModel, prompts: Sequence[str] | None) -> None:
        """Prompts as tokens. Built-in ones that the context has no room for are left out; given ones must fit."""
        room = model.context_length - self.settings.max_tokens - 1
        raw = not model.tokenizer.has_chat_template
        encoded = [model.encode(prompt, raw) for prompt in (built_in_prompts() if prompts is None else prompts)]
        longest = max(map(len, encoded), default=0)
        if prompts is not None and longest > room:
            raise UsageError(
                f"a prompt has {longest} tokens, but the context of {model.context_length} leaves room for {room} "
                f"beside an answer of {self.settings.max_tokens}: shorten it"
            )
        self.prompts = [tokens for tokens in encoded if len(tokens) <= room]
        if not self.prompts:
            raise UsageError(
                f"no prompt fits a context of {model.context_length} beside an answer of {self.settings.max_tokens} "
                "tokens: ask for a shorter answer, or give short prompts of your own"
            )
        words = [token for tokens in encoded for token in tokens]
        self.long_prompt = repeat_to(words, min(self.settings.prompt_tokens, model.context_length - 1))


class _Attempt:
    """`with` it, a fault becomes the row's failure and the others go on."""

    def __init__(self, row: Row):
        self.row = row

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, trace: object) -> bool:
        if not isinstance(fault, Exception):
            return False  # nothing happened, or Ctrl-C
        self.row.failure = reason(fault)
        fault.__traceback__ = None  # it holds the tensors that did not fit
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return True


def reason(fault: Exception) -> str:
    """One sentence: ours as it is, another one with its kind."""
    if isinstance(fault, torch.OutOfMemoryError):
        return "not enough GPU memory"
    if isinstance(fault, MemoryError) or "can't allocate memory" in str(fault):
        return "not enough memory"
    sentence = " ".join(str(fault).split())
    if isinstance(fault, FewerError):
        return sentence
    return f"{type(fault).__name__}: {sentence[:200]}" if sentence else type(fault).__name__


def _weights_of(recipe: Recipe) -> Recipe:
    """The part of a recipe that decides what is loaded; with_recipe does the rest."""
    return Recipe(weights=recipe.weights, experts=recipe.experts, dtype=recipe.dtype)


def _check(settings: Settings) -> None:
    least = {"max_tokens": 2, "rounds": 1, "batch": 1, "prompt_tokens": 1, "text_tokens": 2, "window": 2}
    for name, lowest in least.items():
        value = getattr(settings, name)
        if value < lowest:
            raise UsageError(f"{name} is {value}: use at least {lowest}")
