"""Session: one batch of sequences with their cache; prefill, decode, verify, commit, rollback."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing

import torch
from torch import Tensor

from fewer.engine.runner import Runner
from fewer.errors import UsageError
from fewer.kernels.from_host import from_host
from fewer.model.step import Step
from fewer.slots import CorrectedCache, DraftTree, KVCache, SharingCache

AHEAD = 256  # tokens that `greedy` makes room for at once


class Session:
    """B sequences of unequal lengths. What is fed is committed, except in `verify`, which waits for `commit`."""

    def __init__(self, runner: Runner, cache: KVCache, context_length: int | None = None):
        self.runner = runner
        self.cache = cache
        self.config = runner.config
        self.context_length = context_length or runner.config.context_length
        self.passes = 0  # target passes since the start, prefill chunks not counted
        # By row: what is told the final norm's output [n, d] of tokens when they are committed, in their order. Steps
        # then run where all hidden states come out; while this is empty it costs nothing.
        self.observers: Mapping[int, Callable[[Tensor], None]] = {}
        self._tentative: Tensor | None = None  # [B, T, d] of the verified trees that wait for `commit`

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row whose keys are committed."""
        return self.cache.lengths

    def prefill(self, prompts: Sequence[Sequence[int] | Tensor]) -> Tensor:
        """Feed each row's tokens in chunks -> logits after each row's last token [B, V] float32."""
        rows = _not_empty([torch.as_tensor(prompt, dtype=torch.int64) for prompt in prompts])
        held = self._feed_shared(rows)
        return self._feed([row[n:] for row, n in zip(rows, held, strict=True)])

    def _feed_shared(self, rows: list[Tensor]) -> list[int]:
        """Feed once what several prompts begin with -> how many tokens of each prompt its row holds now."""
        if not isinstance(self.cache, SharingCache) or self.observers:  # each row has to run all of its tokens
            return [0] * len(rows)
        self._check_context([len(row) for row in rows])
        before = self.lengths
        with closing(self.cache.shared_runs([row.tolist() for row in rows])) as runs:
            for cache, texts in runs:
                level = Session(self.runner, cache, self.context_length)
                level._feed([torch.tensor(text, dtype=torch.int64) for text in texts])
        return [now - then for now, then in zip(self.lengths, before, strict=True)]

    def prefill_embeddings(self, embeddings: Sequence[Tensor]) -> Tensor:
        """Feed soft tokens [n, d] instead of tokens -> logits [B, V] float32."""
        return self._feed(_not_empty(list(embeddings)))

    def _feed(self, rows: list[Tensor], again: bool = False) -> Tensor:
        """Logits of the rows that bring something. `again`: observers have seen these tokens."""
        sizes = [len(row) for row in rows]
        self._make_room(sizes)
        start, device = self.lengths, self.runner.device
        chunk = min(self.runner.chunk, self.cache.max_step or self.runner.chunk)
        result: list[Tensor | None] = [None] * len(rows)
        for offset in range(0, max(sizes), chunk):
            new = [max(0, min(chunk, size - offset)) for size in sizes]
            width = max(new)
            parts = [row[offset : offset + n] for row, n in zip(rows, new, strict=True)]
            padded = torch.stack([_pad(part, width) for part in parts]).to(device)
            first = torch.tensor([min(s + offset, s + size) for s, size in zip(start, sizes, strict=True)])
            done = [row for row, size in enumerate(sizes) if offset < size <= offset + chunk]
            step = Step(
                tokens=padded if padded.dim() == 2 else None,
                embeddings=padded if padded.dim() == 3 else None,
                positions=(first[:, None] + torch.arange(width)).to(device),
                role="prompt",
                lengths=None if min(new) == width else new,
                logits="last" if done else "none",
                hidden=bool(self.observers) and not again,
            )
            output = self.runner.step(step, self.cache)
            logits = output.logits
            self.cache.commit(new)
            if step.hidden:
                self._tell(output.hidden, [range(n) for n in new])
            for row in done:
                assert logits is not None
                result[row] = logits[row]
        return torch.stack([logits for logits in result if logits is not None])

    def decode(self, tokens: Sequence[int] | Tensor, active: Sequence[bool] | None = None) -> Tensor:
        """Feed one token a row -> logits [B, V] float32. Rows that are not active are left as they were."""
        self._correct()
        lengths = self.lengths
        self.passes += 1
        if len(lengths) == 1 and (active is None or active[0]) and not self.observers:
            self._make_room([1])
            return self.runner.decode_one(int(tokens[0]), lengths[0], self.cache)
        new = [1] * len(lengths) if active is None else [int(flag) for flag in active]
        self._make_room(new)
        device = self.runner.device
        step = Step(
            tokens=torch.as_tensor(tokens, dtype=torch.int64).view(-1, 1).to(device),
            positions=from_host(lengths, torch.int64, device)[:, None],
            role="generated",
            lengths=None if all(new) else new,
            hidden=bool(self.observers),
        )
        output = self.runner.step(step, self.cache)
        self.cache.commit(new)
        if step.hidden:
            self._tell(output.hidden, [range(n) for n in new])
        assert output.logits is not None
        return output.logits

    def greedy(self, token: int, count: int) -> Iterator[int]:
        """Feed `token` to a single sequence, then each most likely token (the lowest of equals): yields `count` of
        them. All but the last are fed; a caller that stops earlier leaves the last one it saw unfed, too."""
        while count:
            if not self.runner.has_fast_path(self.cache):
                token, count = int(self.decode((token,)).argmax()), count - 1
                yield token
                continue
            room = self.runner.fast_room(self.cache)
            part = min(count, AHEAD, AHEAD if room is None else room)
            self._make_room([part])
            for following in self.runner.greedy(token, self.lengths[0], self.cache, part):
                self.passes, token, count = self.passes + 1, following, count - 1
                yield token

    def verify(self, trees: Sequence[DraftTree | None]) -> list[Tensor | None]:
        """Run each row's draft tree in one pass -> logits [n + 1, V]: row i predicts the children of node i.

        Nothing is committed until `commit`.
        """
        self._correct()
        new = [0 if tree is None else len(tree.tokens) for tree in trees]
        width, device = max(new), self.runner.device
        self._make_room(new)
        self.passes += 1
        tokens = torch.zeros(len(trees), width, dtype=torch.int64)
        positions = torch.zeros(len(trees), width, dtype=torch.int64)
        for row, (tree, length) in enumerate(zip(trees, self.lengths, strict=True)):
            positions[row] = length
            if tree is not None:
                tokens[row, : new[row]] = torch.tensor(tree.tokens)
                positions[row, : new[row]] += torch.tensor(tree.depth)
        chains = all(tree is None or tree.is_chain for tree in trees)
        step = Step(
            tokens=tokens.to(device),
            positions=positions.to(device),
            role="generated",
            lengths=None if min(new) == width else new,
            mask="causal" if chains else "tree",
            ancestors=None if chains else ancestors([tree.parents if tree else [] for tree in trees], width),
            logits="all",
            hidden=bool(self.observers),
        )
        output = self.runner.step(step, self.cache)
        logits, self._tentative = output.logits, output.hidden if step.hidden else None
        assert logits is not None
        return [None if tree is None else logits[row, : new[row]] for row, tree in enumerate(trees)]

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep the accepted nodes of each row, ascending and with the root (node 0); drop the others."""
        self.cache.commit(paths)
        if self._tentative is not None:
            self._tell(self._tentative, paths)
            self._tentative = None

    def _tell(self, hidden: Tensor | None, kept: Sequence[Sequence[int]]) -> None:
        """hidden [B, T, d] and the places of each row that were committed, for those who observe them."""
        assert hidden is not None
        for row, observe in self.observers.items():
            places = kept[row]
            if len(places):
                first, count = places[0], len(places)
                run = places[-1] == first + count - 1
                observe(hidden[row, first : first + count] if run else hidden[row, list(places)])

    def rollback(self, lengths: Sequence[int]) -> None:
        """Cut each row to this many committed tokens."""
        for row, length in enumerate(lengths):
            if length < self.lengths[row]:
                self.cache.truncate(row, length)

    def _correct(self) -> None:
        """Feed again, as prompts, the last tokens whose keys the cache no longer wants as they are."""
        if not isinstance(self.cache, CorrectedCache):
            return
        texts = self.cache.due()
        if texts is not None:
            self.rollback([length - len(text) for length, text in zip(self.lengths, texts, strict=True)])
            self._feed([torch.tensor(text, dtype=torch.int64) for text in texts], again=True)

    def _make_room(self, new: Sequence[int]) -> None:
        self._check_context(new)
        # Padding reaches as far as the longest row's start plus the widest row.
        self.cache.reserve(max(self.cache.physical_lengths) + max(new))

    def _check_context(self, new: Sequence[int]) -> None:
        wanted = max(length + n for length, n in zip(self.lengths, new, strict=True))
        if not self.cache.renumbers and wanted > self.context_length:
            raise UsageError(
                f"{wanted} tokens do not fit the model's context of {self.context_length}: shorten the prompt or "
                "generate less"
            )


def _not_empty(prompts: list[Tensor]) -> list[Tensor]:
    if min(map(len, prompts)) == 0:
        raise UsageError("a prompt is empty: give at least one token")
    return prompts


def ancestors(parents: Sequence[Sequence[int]], width: int) -> Tensor:
    """[B, width, width] bool: entry (b, i, j) = j is i or an ancestor of i in row b's tree."""
    mask = torch.eye(width, dtype=torch.bool).expand(len(parents), width, width).clone()
    for row, tree in enumerate(parents):
        for node in range(1, len(tree)):
            mask[row, node] |= mask[row, tree[node]]
    return mask


def _pad(part: Tensor, width: int) -> Tensor:
    missing = width - len(part)
    return part if not missing else torch.cat((part, part.new_zeros(missing, *part.shape[1:])))
