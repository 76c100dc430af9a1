"""One new token a row that reads everything and says which tokens were best, or reads only what another layer chose.

Source: TidalDecode, arXiv 2410.05076. Keys and values are contiguous [B, Hk, S, D]: the new ones take the slots of
their positions. Nothing here looks at lengths on the host, so a graph serves all up to S.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewer.kernels.new_tokens import NewTokens
from fewer.kernels.triton.list_attention import attend_new
from fewer.kernels.triton.new_tokens import turn_and_store
from fewer.kernels.triton.top_k import top_k


def attend_and_choose(new: NewTokens, keys: Tensor, values: Tensor, rows: Tensor, chosen: Tensor) -> None:
    """Attention to all tokens; chosen [B, H or Hk, k] int32 gets the k best of each query head, or of each group of
    heads by the best score in it, the newest always among them. rows [B, 1] int32: 0, 1, … B - 1."""
    q = turn_and_store(new, keys, values)
    batch, _, capacity, _ = keys.shape
    scores = torch.empty(batch, new.heads, capacity, device=keys.device)
    attend_new(new, q, keys, values, rows, scores=scores)
    top_k(scores, chosen.shape[2], new.positions, chosen.shape[1], chosen, new.workspace, new.pdl)


def attend_chosen(new: NewTokens, keys: Tensor, values: Tensor, rows: Tensor, chosen: Tensor) -> None:
    """Attention to the tokens chosen [B, H or Hk, k] alone; those behind a row's newest count as none."""
    attend_new(new, turn_and_store(new, keys, values), keys, values, rows, chosen)
