"""REST: what followed the longest match, most frequent first, and never another text than plain decoding's."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from fewer.decoding.generate import Counts
from fewer.decoding.rest import Datastore, Rest, RestConfig, SuffixDrafter, read_datastore
from fewer.errors import UsageError
from tests.decoding.test_speculation import GREEDY, PROMPTS, run
from tests.random_model import random_transformer


@pytest.mark.parametrize("seed", range(10))
def test_the_datastore_finds_all_places_behind_the_longest_match(seed: int) -> None:
    dice = random.Random(seed)
    text = [dice.randrange(4) for _ in range(60)]
    store = Datastore(text, 6)
    for _ in range(30):
        context = [dice.randrange(5) for _ in range(dice.randint(1, 9))]

        def match(place: int, context: list[int] = context) -> int:
            length = 0
            while length < min(6, len(context), place) and text[place - 1 - length] == context[-1 - length]:
                length += 1
            return length

        best = max(match(place) for place in range(60))
        length, places = store.find(context)
        assert length == best
        assert sorted(places) == ([place for place in range(60) if match(place) == best] if best else [])


def test_the_longest_match_decides_and_shared_beginnings_come_first() -> None:
    drafter = SuffixDrafter(RestConfig(tokens=5, shortest=1, depth=3))
    drafter.start([])
    text = [7, 1, 2, 3, 8, 1, 2, 4, 9, 1, 2, 3, 5, 1, 2]
    draft = drafter.propose(text, 20)
    assert draft.tokens == [2, 3, 4, 5, 8, 9] and draft.parents == [-1, 0, 0, 1, 1, 2]
    assert drafter.propose([*text, 3, 8, 1, 2], 3).tokens == [2, 4, 9, 1]  # after "3 8 1 2", not after "1 2"


def test_a_copy_runs_into_itself() -> None:
    drafter = SuffixDrafter(RestConfig(depth=5))
    drafter.start([])
    assert drafter.propose([4, 8, 4, 8], 9).tokens == [8, 4, 8, 4, 8, 4]


def test_a_longer_match_in_the_datastore_wins() -> None:
    drafter = SuffixDrafter(RestConfig(depth=2), Datastore([1, 2, 3, 30, 31], 16))
    drafter.start([])
    assert drafter.propose([2, 3, 20, 1, 2, 3], 9).tokens == [3, 30, 31]
    assert drafter.propose([2, 3, 20, 5, 2, 3], 9).tokens == [3, 20, 30, 5, 31]
    assert drafter.propose([6, 6], 9).tokens == [6]


def test_every_datastore_gives_the_plain_tokens() -> None:
    model = random_transformer()
    prompts = PROMPTS[:12]
    expected = run(model, prompts)
    rates = []
    text = [token for prompt, answer in zip(prompts, expected, strict=True) for token in prompt + answer]
    for store in (None, Datastore(text, 16), Datastore(text[::-1], 16)):
        strategy, counts = Rest(), Counts()
        strategy.store = store
        assert run(model, prompts, strategy, counts=counts) == expected
        rates.append(counts.tau)
    assert rates[1] > 3 > rates[2]
    assert Rest().drafter(GREEDY, 0) is not None


def test_a_text_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    tokenizer = SimpleNamespace(encode=lambda text, special=True, bos=None: [ord(c) for c in text])
    (tmp_path / "empty").write_text("")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for name, fault in (("missing", "cannot read"), ("empty", "is empty"), ("bytes", "UTF-8")):
        with pytest.raises(UsageError, match=fault):
            read_datastore(tmp_path / name, tokenizer, 4)
    (tmp_path / "text").write_text("abcab")
    assert read_datastore(tmp_path / "text", tokenizer, 4).find([97, 98]) == (2, [2])


@pytest.mark.parametrize("settings", [{"tokens": 64}, {"shortest": 5, "longest": 4}, {"depth": 0}])
def test_settings_out_of_range_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=r"rest: .* out of range"):
        RestConfig(**settings)
