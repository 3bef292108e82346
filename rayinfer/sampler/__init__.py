"""Batched sampling on the engine's device, and log-probabilities of what was sampled."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional as F

_ROWS = 128  # whose logits, several times in four and eight bytes each, are looked at at once


def get_sampler(device: torch.device) -> ModuleType:
    """The module whose `greedy` and `sample` run on this device (one signature, equal tokens)."""
    if device.type == "cuda":
        from rayinfer.kernels import sampling

        return sampling
    from rayinfer.sampler import reference

    return reference


def logprobs(logits_RV: torch.Tensor, token_R: torch.Tensor, num_top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of given tokens and of the likeliest ones, from raw logits in float32.

    Args:
        token_R: int64 [R], clamped to the vocabulary by the caller.
        num_top: how many of the likeliest to add.

    Returns:
        float32 [R, 2 + num_top]: the token's log-probability, its rank (1 is the likeliest), then the top ones;
        int64 [R, num_top]: their ids.
    """
    parts = zip(logits_RV.split(_ROWS), token_R.split(_ROWS), strict=True)
    values, ids = zip(*(_logprobs(*part, num_top) for part in parts), strict=True)
    return torch.cat(values), torch.cat(ids)


def _logprobs(logits_RV: torch.Tensor, token_R: torch.Tensor, num_top: int) -> tuple[torch.Tensor, torch.Tensor]:
    logits_RV = logits_RV.float()
    norm_R1 = _logsumexp(logits_RV)
    chosen_R1 = logits_RV.gather(1, token_R[:, None])
    rank_R1 = (logits_RV > chosen_R1).sum(-1, keepdim=True) + 1
    id_Rk = _top_ids(logits_RV, num_top)
    return torch.cat([chosen_R1 - norm_R1, rank_R1.float(), logits_RV.gather(1, id_Rk) - norm_R1], 1), id_Rk


def _logsumexp(logits_RV: torch.Tensor) -> torch.Tensor:
    """log(sum(exp)) of each row, [R, 1], by halves: the order of torch's own sums depends on the number of rows."""
    high_R1 = logits_RV.amax(-1, keepdim=True)
    size = 1 << (logits_RV.shape[1] - 1).bit_length()
    sum_RV = F.pad((logits_RV - high_R1).exp(), (0, size - logits_RV.shape[1]))
    while sum_RV.shape[1] > 1:
        left_RV, right_RV = sum_RV.chunk(2, 1)
        sum_RV = left_RV + right_RV
    return high_R1 + sum_RV.log()


def _top_ids(logits_RV: torch.Tensor, num_top: int) -> torch.Tensor:
    """Ids of the largest, int64 [R, k]; the lowest id on ties, of which bfloat16 logits have many."""
    if not num_top:
        return torch.zeros(len(logits_RV), 0, dtype=torch.int64, device=logits_RV.device)
    bits_RV = logits_RV.view(torch.int32).long()
    order_RV = torch.where(bits_RV < 0, -(2**31) - bits_RV, bits_RV)  # integers in the order of the floats
    key_RV = order_RV * 2**32 + (2**32 - 1 - torch.arange(logits_RV.shape[1], device=logits_RV.device))
    return 2**32 - 1 - key_RV.topk(min(num_top, logits_RV.shape[1]), -1).values % 2**32


def row_by_row(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of rows, called for each row alone: its bits do not depend on the number of rows then.

    The first axis of every tensor among the arguments, and of every tensor returned, counts rows.
    """

    def call(*args: Any) -> Any:
        if not len(args[0]):
            return function(*args)
        rows = [[a[i : i + 1].clone() if isinstance(a, torch.Tensor) else a for a in args] for i in range(len(args[0]))]
        parts = [function(*row) for row in rows]
        return tuple(map(torch.cat, zip(*parts, strict=True))) if isinstance(parts[0], tuple) else torch.cat(parts)

    return call
