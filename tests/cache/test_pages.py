"""A pool of pages under random use: every row reads what it wrote, no page leaks, a refusal changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fewer.cache.pages import NONE, PagePool
from fewer.errors import PoolExhausted

CPU = torch.device("cpu")
SIZE, ROWS = 4, 4
row = st.integers(0, ROWS - 1)


def pool_of(pages: int, grows: bool = False, batch: int = ROWS) -> PagePool:
    return PagePool(2, batch, 1, 1, SIZE, pages, torch.float32, CPU, grows)


def state_of(pool: PagePool) -> tuple[object, ...]:
    """Everything that a refused step must leave as it was."""
    plain = (pool.rows, pool.lengths, pool.owners, pool.free, pool.published, pool.keys)
    return copy.deepcopy((*plain, pool.table.tolist(), pool.storage.nan_to_num(-1.0).tolist()))


class Rows(RuleBasedStateMachine):
    """Every slot is stored as a number that stands for its whole text (or a new one, where the text is not known), so a
    page that is shared with the wrong row, or written under another owner, shows."""

    grows = False

    def __init__(self) -> None:
        super().__init__()
        self.pool = pool_of(3 if self.grows else 9, self.grows)
        self.numbers: list[list[int]] = [[] for _ in range(ROWS)]  # what each slot of a row must hold
        self.texts: list[list[int]] = [[] for _ in range(ROWS)]  # the part of a row whose tokens are known
        self.names: dict[object, int] = {}

    def name(self, of: object) -> int:
        return self.names.setdefault(of, len(self.names) + 1)

    @rule(
        new=st.lists(st.lists(st.integers(0, 1), max_size=11), min_size=ROWS, max_size=ROWS),
        prompt=st.booleans(),
        fails=st.sampled_from([False, False, False, True]),
    )
    def step(self, new: list[list[int]], prompt: bool, fails: bool) -> None:
        starts = [len(numbers) for numbers in self.numbers]
        stops = [start + len(tokens) for start, tokens in zip(starts, new, strict=True)]
        texts: list[list[int] | None] = [
            text + tokens if prompt and len(text) == start else None
            for text, tokens, start in zip(self.texts, new, starts, strict=True)
        ]
        before = state_of(self.pool)
        try:
            firsts = self.pool.prepare(starts, stops, texts)
        except PoolExhausted:
            assert state_of(self.pool) == before
            return
        rows = zip(starts, stops, texts, strict=True)
        numbers = [
            [self.name(tuple(text[: at + 1]) if text else object()) for at in range(start, stop)]
            for start, stop, text in rows
        ]
        for row, (first, stop) in enumerate(zip(firsts, stops, strict=True)):
            assert starts[row] <= first <= stop
            at = torch.arange(first, stop)
            pages, places = self.pool.places(torch.full_like(at, row), at)
            written = torch.tensor(numbers[row][first - starts[row] :], dtype=torch.float32)
            self.pool.storage[:, :, pages, 0, places, 0] = torch.nan if fails else written
        if fails:
            self.pool.abandon(starts)
            return
        for row, text in enumerate(texts):
            self.numbers[row] += numbers[row]
            self.texts[row] = self.texts[row] if text is None else text

    @rule(row=row, part=st.floats(0, 1))
    def cut(self, row: int, part: float) -> None:
        length = int(part * len(self.numbers[row]))
        self.pool.cut(row, length)
        del self.numbers[row][length:], self.texts[row][length:]

    @rule(row=row)
    def release(self, row: int) -> None:
        self.pool.release(row)
        self.numbers[row], self.texts[row] = [], []

    @rule(row=row, into=row)
    def fork(self, row: int, into: int) -> None:
        if row != into:
            self.pool.fork(row, into)
            self.numbers[into], self.texts[into] = list(self.numbers[row]), list(self.texts[row])

    @rule(row=row, into=row, part=st.floats(0, 1))
    def share(self, row: int, into: int, part: float) -> None:
        if row != into:
            length = int(part * len(self.numbers[row]))
            self.pool.share(row, into, length)
            self.numbers[into], self.texts[into] = self.numbers[row][:length], self.texts[row][:length]

    @invariant()
    def every_row_reads_what_it_wrote(self) -> None:
        for row, numbers in enumerate(self.numbers):
            at = torch.arange(len(numbers))
            pages, places = self.pool.places(torch.full_like(at, row), at)
            stored = self.pool.storage[:, :, pages, 0, places, 0]
            assert torch.equal(stored, torch.tensor(numbers, dtype=torch.float32).expand_as(stored))

    @invariant()
    def owners_are_the_rows_that_list_a_page(self) -> None:
        pool = self.pool
        listed = [page for pages in pool.rows for page in pages]
        assert pool.owners == [listed.count(page) for page in range(pool.pages)]
        assert sorted(pool.free) == [page for page in range(pool.pages) if page not in listed]
        assert [len(pages) for pages in pool.rows] == [pool.pages_for(len(numbers)) for numbers in self.numbers]
        width = pool.table.shape[1]
        assert pool.table.tolist() == [pages + [NONE] * (width - len(pages)) for pages in pool.rows]
        assert pool.storage.shape[2] == pool.pages

    @invariant()
    def published_pages_have_owners(self) -> None:
        pool = self.pool
        assert {page: key for key, page in pool.published.items()} == pool.keys
        assert all(pool.owners[page] > 0 for page in pool.keys)

    def teardown(self) -> None:
        for row in range(ROWS):
            self.pool.release(row)
        assert self.pool.owned == 0 and not any(self.pool.owners)
        assert not self.pool.published and not self.pool.keys
        assert len(set(self.pool.free)) == self.pool.pages


class GrowingRows(Rows):
    grows = True


Rows.TestCase.settings = GrowingRows.TestCase.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None
)
TestRows = Rows.TestCase
TestGrowingRows = GrowingRows.TestCase


# ── single cases that a reader can follow ────────────────────────────────────────────────────────────────────────────


def test_a_fork_copies_the_common_page_that_is_written_and_no_other() -> None:
    pool = pool_of(9)
    pool.prepare([0, 0, 0, 0], [6, 0, 0, 0])
    pool.storage[:, :, pool.rows[0][1], :, :2] = 7.0
    pool.fork(0, 1)
    assert pool.rows[0] == pool.rows[1] and pool.owned == 2
    pool.prepare([6, 6, 0, 0], [7, 7, 0, 0])  # the first of the two copies, the other is then alone
    assert pool.rows[0][0] == pool.rows[1][0] and pool.rows[0][1] != pool.rows[1][1] and pool.owned == 3
    assert (pool.storage[:, :, pool.rows[0][1], :, :2] == 7.0).all()


def test_equal_prompts_share_whole_pages_also_in_one_step() -> None:
    pool = pool_of(9)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    other = [*prompt[:4], 0, *prompt[5:]]
    firsts = pool.prepare([0] * 4, [9, 9, 9, 0], [prompt, prompt, other, None])
    assert firsts == [0, 8, 4, 0]
    assert pool.rows[0][:2] == pool.rows[1][:2] and pool.rows[2][0] == pool.rows[0][0]
    assert pool.owned == 3 + 1 + 2
    later = pool.prepare([9, 9, 9, 0], [9, 9, 9, 8], [None, None, None, other[:8]])
    assert later[3] == 8 and pool.rows[3] == pool.rows[2][:2]


def test_equal_tokens_after_different_beginnings_are_not_shared() -> None:
    pool = pool_of(9)
    pool.prepare([0] * 4, [8, 8, 0, 0], [[1] * 4 + [2] * 4, [3] * 4 + [2] * 4, None, None])
    assert not set(pool.rows[0]) & set(pool.rows[1])


@pytest.mark.parametrize("at_once", [False, True])
def test_a_page_that_is_written_again_is_no_longer_found(at_once: bool) -> None:
    pool, prompt = pool_of(9), [1, 2, 3, 4, 5, 6, 7, 8]
    pool.prepare([0] * 4, [8, 0, 0, 0], [prompt, None, None, None])
    pool.cut(0, 6)
    if at_once:
        firsts = pool.prepare([6, 0, 0, 0], [8, 8, 0, 0], [None, prompt, None, None])
    else:
        pool.prepare([6, 0, 0, 0], [8, 0, 0, 0])
        firsts = pool.prepare([8, 0, 0, 0], [8, 8, 0, 0], [None, prompt, None, None])
    assert firsts[1] == 4 and pool.rows[1][0] == pool.rows[0][0] and pool.rows[1][1] != pool.rows[0][1]


def test_a_page_that_another_row_finds_in_the_same_step_is_copied_before_it_is_written_again() -> None:
    pool, prompt = pool_of(9), [1, 2, 3, 4, 5, 6, 7, 8]
    pool.prepare([0] * 4, [0, 8, 0, 0], [None, prompt, None, None])
    found = list(pool.rows[1])
    pool.cut(1, 6)
    assert pool.prepare([0, 6, 0, 0], [8, 8, 0, 0], [prompt, None, None, None]) == [8, 6, 0, 0]
    assert pool.rows[0] == found and pool.rows[1][1] != found[1]


def test_a_row_that_goes_back_and_comes_again_with_the_same_tokens_writes_nothing() -> None:
    pool, prompt = pool_of(9), [1, 2, 3, 4, 5, 6, 7, 8]
    pool.prepare([0] * 4, [8, 0, 0, 0], [prompt, None, None, None])
    pool.cut(0, 6)
    assert pool.prepare([6, 0, 0, 0], [8, 0, 0, 0], [prompt, None, None, None]) == [8, 0, 0, 0]
    assert pool.owned == 2 and pool.owners.count(1) == 2


def test_a_row_does_not_give_up_its_own_tokens_for_a_page_that_the_step_has_yet_to_write() -> None:
    pool = pool_of(9)
    pool.prepare([0] * 4, [0, 3, 0, 0])
    own = list(pool.rows[1])
    prompt = [1, 2, 3, 4]
    assert pool.prepare([0, 3, 0, 0], [4, 4, 0, 0], [prompt, prompt, None, None]) == [0, 3, 0, 0]
    pool.abandon([0, 3, 0, 0])  # row 0's page was never written
    assert pool.rows[1] == own and pool.owned == 1
    assert pool.prepare([0, 3, 0, 0], [3, 3, 0, 0], [prompt[:3], None, None, None]) == [0, 3, 0, 0]
    both = pool.prepare([3, 3, 0, 0], [4, 4, 0, 0], [prompt, prompt, None, None])
    assert both == [3, 4, 0, 0] and pool.rows[0] == pool.rows[1]  # both hold the same three tokens already


def test_exhaustion_says_how_many_pages_and_takes_none() -> None:
    pool = pool_of(4)
    assert pool.admits(16) and not pool.admits(17)
    pool.prepare([0] * 4, [9, 0, 0, 0])
    before = state_of(pool)
    with pytest.raises(PoolExhausted, match="pool of 4 pages .4 tokens each. is used up: this step needs 2 more"):
        pool.prepare([9, 0, 0, 0], [12, 4, 1, 0])
    assert state_of(pool) == before
    pool.prepare([9, 0, 0, 0], [12, 4, 0, 0])
    assert not pool.admits(1)


def test_a_growing_pool_keeps_what_it_holds() -> None:
    pool = pool_of(1, grows=True)
    pool.prepare([0] * 4, [4, 0, 0, 0])
    pool.storage[:, :, pool.rows[0]] = 5.0
    held = pool.nbytes
    pool.prepare([4, 0, 0, 0], [4, 40, 0, 0])
    assert (pool.storage[:, :, pool.rows[0]] == 5.0).all() and pool.nbytes > held and pool.pages >= 11
    assert pool.admits(10**9)


def test_rows_are_written_to_their_end() -> None:
    pool = pool_of(4)
    pool.prepare([0] * 4, [9, 0, 0, 0])
    for start, stop in ((2, 5), (10, 12)):
        with pytest.raises(ValueError, match="row 0 holds 9 slots"):
            pool.prepare([start, 0, 0, 0], [stop, 0, 0, 0])
    with pytest.raises(ValueError, match="cannot share 10 tokens of row 0, which has 9"):
        pool.share(0, 1, 10)
