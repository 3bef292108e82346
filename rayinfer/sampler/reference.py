"""Sampling in plain torch, batched: what a CPU runs, equal token for token to `rayinfer.kernels.sampling`."""

import torch

_U32 = 0xFFFFFFFF


def greedy(logits_RV: torch.Tensor) -> torch.Tensor:
    """Likeliest token of each row, int32 [R]; the lowest id on ties; -1 for a row that holds NaN or no finite logit."""
    best = logits_RV.max(dim=-1)
    # max propagates NaN, so one look at the maximum is enough.
    return torch.where(best.values.isfinite(), best.indices.to(torch.int32), -1)


def sample(
    logits_RV: torch.Tensor, temperature_R: torch.Tensor, top_k_R: torch.Tensor, top_p_R: torch.Tensor,
    min_p_R: torch.Tensor, seed_R: torch.Tensor, position_R: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Draw one token a row: temperature, top-k, top-p over the rest, min-p, then Gumbel-max.

    Args:
        logits_RV: float [R, V]. top_k_R: int, 0 or less keeps all. seed_R, position_R: int64; the noise of a token is a
            function of (seed, position, token) alone.

    Returns:
        int32 [R]; -1 for a row that holds NaN or no finite logit. Temperature 0 is greedy.
    """
    greedy_R = greedy(logits_RV)
    rows = (temperature_R > 0).nonzero().squeeze(1)
    if not len(rows):
        return greedy_R
    inverse_R = 1 / temperature_R[rows].float().clamp(min=1e-30)  # smaller ones draw the likeliest token just as well
    scaled_RV = logits_RV[rows].float() * inverse_R[:, None]
    keep_RV = _keep(scaled_RV, top_k_R[rows], top_p_R[rows].float(), min_p_R[rows].float())
    noisy_RV = scaled_RV + gumbel(seed_R[rows], position_R[rows], scaled_RV.shape[1])
    token_R = noisy_RV.masked_fill(~keep_RV, float("-inf")).argmax(-1).to(torch.int32)
    return greedy_R.index_copy(0, rows, torch.where(greedy_R[rows] < 0, -1, token_R))


def _keep(scaled_RV: torch.Tensor, top_k_R: torch.Tensor, top_p_R: torch.Tensor, min_p_R: torch.Tensor) -> torch.Tensor:
    """Tokens that pass the filters, bool [R, V]; ties at a threshold stay, as the kernel's threshold search has it."""
    num_tokens = scaled_RV.shape[1]
    keep_RV = torch.ones_like(scaled_RV, dtype=torch.bool)
    if bool((top_k_R > 0).any()) or bool((top_p_R < 1).any()):
        sorted_RV = scaled_RV.sort(-1, descending=True).values
        last_R = torch.where(top_k_R > 0, top_k_R.clamp(max=num_tokens), num_tokens).long() - 1
        keep_RV = scaled_RV >= sorted_RV.gather(1, last_R[:, None])
        sorted_RV = sorted_RV.masked_fill(sorted_RV < sorted_RV.gather(1, last_R[:, None]), float("-inf"))
        mass_RV = sorted_RV.softmax(-1).cumsum(-1)
        num_R = (mass_RV < top_p_R[:, None]).sum(-1).clamp(max=num_tokens - 1)  # the token that reaches top_p stays
        keep_RV &= (scaled_RV >= sorted_RV.gather(1, num_R[:, None])) | (top_p_R >= 1)[:, None]
    floor_R = scaled_RV.amax(-1) + torch.log(min_p_R)  # p < min_p * p_max, in logits; log(0) keeps all
    return keep_RV & (scaled_RV >= floor_R[:, None])


def gumbel(seed_R: torch.Tensor, position_R: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Gumbel noise, float32 [R, num_tokens], from a counter-based hash of (seed, position, token).

    Each stage is the 32-bit finaliser of MurmurHash3 (A. Appleby, public domain). u takes 2^23 values and is never 0
    or 1: with 24 bits the largest would round up to 1 in float32, and its noise would be infinite.
    """
    state_R = _mix((seed_R & _U32) ^ _mix((position_R + 0x9E3779B9) & _U32))
    state_R = _mix(state_R ^ ((seed_R >> 32) & _U32))
    token_V = (torch.arange(num_tokens, device=seed_R.device) * 0x9E3779B1) & _U32
    x_RV = _mix(state_R[:, None] ^ token_V)
    u_RV = ((x_RV >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(u_RV))


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _U32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _U32
    return x ^ (x >> 16)
