"""Batched sampling on the engine's device, and log-probabilities of what was sampled."""

from __future__ import annotations

from types import ModuleType

import torch


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
    logits_RV = logits_RV.float()
    norm_R1 = torch.logsumexp(logits_RV, -1, keepdim=True)
    chosen_R1 = logits_RV.gather(1, token_R[:, None])
    rank_R1 = (logits_RV > chosen_R1).sum(-1, keepdim=True) + 1
    top = logits_RV.topk(num_top, -1)
    return torch.cat([chosen_R1 - norm_R1, rank_R1.float(), top.values - norm_R1], 1), top.indices
