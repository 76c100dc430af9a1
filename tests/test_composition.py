"""Every cache with every way of decoding, over dense and over 4-bit weights: a pair keeps what both sides promise, or
is refused in one sentence before a file is opened. Methods are found in the registry: a new one is tested without a
change here, with its default settings until `SMALL` has others."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from fewer.cache.head_gates import GATES
from fewer.decoding.draft_training import stored
from fewer.decoding.generate import Counts, generate
from fewer.decoding.sampling import SamplingConfig
from fewer.errors import FewerError, UsageError
from fewer.language_model import LanguageModel, load
from fewer.recipe import Recipe
from fewer.registry import find, methods
from fewer.training import Adapter, Provenance, adapter_store, save_adapter
from tests.decoding.trained_drafters import fresh
from tests.random_model import random_tokens
from tests.tiny_model import write_model

CONTEXT, LAYERS, TOKENS = 120, 4, 40  # the context ends before the answers do
# How close logits are between which rounding may decide, in their standard deviation, under lossless and lossy caches.
# Products of 4-bit weights round x to bfloat16, and where a cache chooses keys by scores, that may choose another key.
ROUNDING = {"dense": (1e-4, 1e-4), "int4": (0.2, 1.0)}
LEARNT = {  # what the methods that are fitted have learnt of the tiny model
    "duo-attention": {GATES: torch.tensor([[0.2, 0.8], [0.9, 0.1], [0.7, 0.6], [0.3, 0.4]])},
    "tidal-decode": {"reselect": torch.tensor([2])},
}

# Settings with which keys go, or are not read, in texts of a hundred tokens, and whose ways to store or read differ.
SMALL = {
    "a2sf": ["budget=24", "budget=24,mode=stepwise,positions=cache"],
    "duo-attention": ["sinks=2,window=14", "sinks=2,window=14,prefill=official,chunk=32"],
    "h2o": ["budget=24", "budget=24,positions=cache"],
    "hydragen": ["shortest=8,split=always"],
    "lserve": [
        "sinks=2,window=14,prefill_window=24,budget=48,page_size=16",
        "sinks=2,window=14,prefill_window=24,budget=48,page_size=16,interval=1,bits=4",
    ],
    "oracle-topk": ["budget=8,start=1"],
    "paged": ["page_size=16"],
    "quest": ["budget=16,page_size=4,start=1", "budget=16,page_size=4,start=1,sets=key-head"],
    "random-topk": ["budget=8,start=1"],
    "sink-window": ["sinks=2,window=14", "sinks=2,window=14,renumber=true"],
    "snapkv": ["budget=24,window=16"],
    "tidal-decode": ["budget=8,start=1", "budget=8,start=0,reselect=none,correct_every=4"],
    "tova": ["budget=24", "budget=24,mode=stepwise"],
}
# Settings with which a lossy cache keeps and reads everything.
WHOLE = {
    "a2sf": "budget=128",
    "duo-attention": "sparsity=0",
    "h2o": "budget=128",
    "lserve": "sparsity=0,budget=192",
    "oracle-topk": "budget=128,start=0",
    "quest": "budget=128,start=0",
    "random-topk": "budget=128,start=0",
    "sink-window": "window=128",
    "snapkv": "budget=128",
    "tidal-decode": "budget=128,start=0",
    "tova": "budget=128",
}

LOSSY = [cache.name for cache in methods("cache") if not cache.lossless]
SPECS = [f"{cache.name}:{each}".rstrip(":") for cache in methods("cache") for each in SMALL.get(cache.name, [""])]
DECODINGS = [decoding.name for decoding in methods("decoding")]
FROM_STATES = ("chimera", "medusa", "eagle")  # learn to guess; what is fitted here has learnt nothing
FROM_PROMPTS = ("aggressive",)  # copy prompts; the tiny model's answers repeat only what they say themselves
LEARNERS = [cache.name for cache in methods("cache") if cache.learnt_by is not None]

BEGINNING = random_tokens(14, vocab_size=300) * 3  # what the prompts have in common; it repeats itself
PROMPTS = [BEGINNING + random_tokens(count, seed=count, vocab_size=300) * 2 for count in (20, 7)]


class Runs:
    """A tiny model on disk, loaded with two kinds of weights, and what it answered under each recipe."""

    def __init__(self, folder: Path):
        write_model(folder, seed=4, context=CONTEXT, layers=LAYERS, spread=1.4)  # answers that repeat what they say
        self.folder = folder
        self.models = {"dense": load(folder, weights="dense", dtype="float32")}
        self.models["int4"] = load(folder, weights="int4:group=32", dtype="float32")
        self.fingerprint = self.models["dense"].checkpoint.fingerprint()
        self.known: dict[tuple[str, str, str], tuple[list[list[int]], Counts]] = {}

    def fit(self) -> None:
        """Put adapters where recipes that name none find them."""
        drafters = {name: stored(fresh(self.models["dense"].transformer, name)) for name in FROM_STATES}
        for method, tensors in (LEARNT | drafters).items():
            self.save(adapter_store.own_path(method, str(self.folder), self.fingerprint), method, tensors)

    def save(self, path: Path, method: str, tensors: dict[str, torch.Tensor]) -> None:
        save_adapter(path, Adapter(tensors, Provenance(method, {}, self.fingerprint, "a text", 0)))

    def model(self, weights: str, cache: str, decoding: str = "plain") -> LanguageModel:
        """Raises UsageError for a pair that is refused."""
        if decoding == "draft-model":
            decoding += f":model={self.folder},tokens=3"
        if decoding in FROM_STATES:
            decoding += ":gate=false,tokens=6"  # trees, whatever the clock says
        model = self.models[weights]
        return model.with_recipe(Recipe(model.recipe.weights, cache, decoding=decoding, dtype="float32"))

    def texts(self, weights: str, cache: str, decoding: str = "plain") -> tuple[list[list[int]], Counts]:
        """The greedy answers to PROMPTS in a batch, and behind them the answer to the first prompt alone."""
        key = weights, cache, decoding
        if key not in self.known:
            model, counts = self.model(*key), Counts()
            self.known[key] = answers(model, PROMPTS, counts) + answers(model, PROMPTS[:1], counts), counts
        return self.known[key]

    def check(self, weights: str, cache: str, texts: list[list[int]], expected: list[list[int]]) -> None:
        """Texts are the same, or part where two tokens are so close under `cache` that rounding decides."""
        for prompt, text, right in zip([*PROMPTS, PROMPTS[0]], texts, expected, strict=True):
            assert len(text) == len(right)
            if text == right:
                continue
            place = next(place for place, pair in enumerate(zip(text, right, strict=True)) if pair[0] != pair[1])
            session = self.model(weights, cache).session()
            logits = session.prefill([prompt])
            for token in right[:place]:
                logits = session.decode([token])
            gap = float(logits[0, right[place]] - logits[0, text[place]]) / float(logits.std())
            bound = ROUNDING[weights][not find("cache", cache.partition(":")[0]).lossless]
            assert abs(gap) < bound, f"token {place} is {text[place]}, not {right[place]}"


def answers(
    model: LanguageModel, prompts: Sequence[Sequence[int]], counts: Counts, tokens: int = TOKENS
) -> list[list[int]]:
    texts: list[list[int]] = [[] for _ in prompts]
    session = model.session(len(prompts))
    for event in generate(session, prompts, SamplingConfig(), model.strategy, tokens, counts=counts):
        texts[event.row] += event.tokens
    return texts


def is_a_sentence(fault: BaseException) -> bool:
    return 20 < len(str(fault)) < 300 and "\n" not in str(fault)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    made = Runs(tmp_path_factory.mktemp("models") / "tiny")  # kernels come from the usual home
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWER_HOME", str(tmp_path_factory.mktemp("home")))
        made.fit()
        yield made


every_kind_of_weights = pytest.mark.parametrize("weights", ROUNDING)
every_cache = pytest.mark.parametrize("cache", SPECS)

# ── pairs ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@every_kind_of_weights
@every_cache
@pytest.mark.parametrize("decoding", DECODINGS)
def test_a_pair_keeps_its_promises_or_is_refused_with_advice_that_works(
    runs: Runs, weights: str, cache: str, decoding: str
) -> None:
    """A lossless way of decoding gives the plain text of this cache, and a lossless cache that of `full`."""
    kind = find("cache", cache.partition(":")[0])
    try:
        runs.model(weights, cache, decoding)
    except UsageError as refusal:
        assert decoding != "plain" and not kind.lossless
        advice = re.search(r"use decoding=(\S+) or cache=(\S+)", str(refusal))
        assert is_a_sentence(refusal) and advice is not None
        runs.model(weights, cache, advice[1])
        runs.model(weights, advice[2], decoding)
        return
    texts, counts = runs.texts(weights, cache, decoding)
    assert all(texts)
    if find("decoding", decoding).lossless:
        runs.check(weights, cache, texts, runs.texts(weights, cache)[0])
        assert decoding in ("plain", *FROM_PROMPTS, *FROM_STATES) or counts.accepted > 0
    if kind.lossless:
        runs.check(weights, "full", texts, runs.texts(weights, "full", decoding)[0])


@every_kind_of_weights
@every_cache
def test_a_prompt_has_the_same_answer_alone_and_in_a_batch(runs: Runs, weights: str, cache: str) -> None:
    texts, _ = runs.texts(weights, cache)
    runs.check(weights, cache, texts, [*texts[:-1], texts[0]])


@every_kind_of_weights
@pytest.mark.parametrize("cache", [name for name in LOSSY if name in WHOLE])
def test_a_cache_that_keeps_everything_gives_the_text_of_full(runs: Runs, weights: str, cache: str) -> None:
    runs.check(weights, "full", runs.texts(weights, f"{cache}:{WHOLE[cache]}")[0], runs.texts(weights, "full")[0])


@pytest.mark.parametrize("cache", [spec for spec in SPECS if spec.partition(":")[0] in LOSSY and ":" in spec])
def test_the_small_settings_really_lose_something(runs: Runs, cache: str) -> None:
    """Otherwise what is compared above would be `full` with itself."""
    pairs = zip(runs.texts("dense", cache)[0], runs.texts("dense", "full")[0], strict=True)
    assert all(text != other for text, other in pairs)


# ── what is asked at the edges ───────────────────────────────────────────────────────────────────────────────────────


@every_cache
@pytest.mark.parametrize("length", [1, 3])
def test_a_prompt_of_a_few_tokens_is_answered_as_by_full(runs: Runs, cache: str, length: int) -> None:
    """It is shorter than a page, a chunk, the sinks or the window that scores keys, and nothing has gone yet."""
    prompts, counts = [[5, 6, 7][:length], [9] * 9], Counts()
    model, full = runs.model("dense", cache), runs.model("dense", "full")
    for batch in (prompts[:1], prompts):
        found = answers(model, batch, counts, tokens=6)[0]
        assert len(found) == 6
        if "bits=" not in cache:  # rounded keys are never those of `full`
            assert found == answers(full, batch, counts, tokens=6)[0]


@every_cache
def test_a_prompt_longer_than_the_context_is_refused_or_forgotten(runs: Runs, cache: str) -> None:
    """Only a cache whose positions do not grow with the text takes it, and then in both ways."""
    model, found = runs.model("dense", cache), []
    prompt = random_tokens(CONTEXT + 40, vocab_size=300)
    try:
        for event in model.events([prompt], 4):
            found += event.tokens
    except UsageError as refusal:
        assert is_a_sentence(refusal) and str(CONTEXT) in str(refusal) and not found
    else:
        assert model.session().cache.renumbers and found
        assert max(model.session().cache.physical_lengths) < CONTEXT


@pytest.mark.parametrize("method", LEARNERS)
@pytest.mark.parametrize("fault", ["of another model", "of another method", "without what the method learns"])
def test_a_wrong_adapter_is_one_sentence(runs: Runs, tmp_path: Path, method: str, fault: str) -> None:
    folder, path, learnt_by = runs.folder, tmp_path / "adapter.safetensors", find("cache", method).learnt_by
    assert learnt_by is not None
    if fault == "of another model":
        folder = write_model(tmp_path / "other", layers=LAYERS)
    tensors = {"other": torch.zeros(3)} if fault.startswith("without") else LEARNT[learnt_by]
    runs.save(path, "another-method" if fault == "of another method" else learnt_by, tensors)
    with pytest.raises(FewerError) as refusal:
        load(folder, cache=f"{method}:adapter={path}").session()
    assert is_a_sentence(refusal.value)


@pytest.mark.parametrize("decoding", DECODINGS)
def test_a_pool_that_is_used_up_ends_a_text_in_one_sentence(runs: Runs, decoding: str) -> None:
    """What was said until then is the plain text."""
    model, found = runs.model("dense", "paged:page_size=16,pages=4", decoding), []
    session = model.session()
    with pytest.raises(FewerError, match="takes 5 pages of 16 tokens, and the cache's pool has 4") as refusal:
        for event in generate(session, [BEGINNING], SamplingConfig(), model.strategy, TOKENS):
            found += event.tokens
    assert is_a_sentence(refusal.value) and len(found) > 64 - len(BEGINNING) - 11
    assert found == answers(runs.model("dense", "full"), [BEGINNING], Counts())[0][: len(found)]
