"""Tiny random-weight models, prompts, and transformers' own answers to compare with."""

from __future__ import annotations

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB, EOS, PAD = 97, 1, 0
SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "eos_token_id": EOS, "bos_token_id": 2,
    "pad_token_id": PAD, "tie_word_embeddings": False,
}  # fmt: skip
TINY = {"device": "cpu", "num_threads": 1, "cpu_kv_cache_gib": 0.05}  # EngineConfig of every engine here
FAMILIES = {
    "llama": ("llama", {}),  # 6 query heads on 2 KV heads: groups of 3
    "qwen3": ("qwen3", {"num_key_value_heads": 3}),
    "gemma3": (
        "gemma3_text",
        {
            "sliding_window": 7, "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "llama128": ("llama", {"head_dim": 128}),  # a head size that every package of attention takes
    "gemma128": (
        "gemma3_text",
        {
            "sliding_window": 7, "query_pre_attn_scalar": 128, "head_dim": 128,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}  # fmt: skip


def save_model(folder: str, family: str, seed: int = 0) -> None:
    """Random weights so wide that greedy output varies and the best logits lie far apart."""
    model_type, changes = FAMILIES[family]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**SHAPE, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                wide = "embed" in name and family != "gemma3"  # Gemma multiplies its embeddings by sqrt(hidden_size)
                weight.copy_(torch.randn(weight.shape) * (1.0 if wide else 0.25))
    model.save_pretrained(folder)


def random_prompts(num: int, low: int = 1, high: int = 40, seed: int = 0) -> list[list[int]]:
    """Prompts of random length; each third one begins like the first, for 24 tokens at most."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, VOCAB, rng.integers(low, high)).tolist() for _ in range(num)]
    for index in range(3, num, 3):
        prompts[index] = prompts[0][:24] + prompts[index]
    return prompts


class Reference:
    """transformers' model of a folder: eager attention, fp32, one row at a time."""

    def __init__(self, folder: str):
        self.model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
        self.model.eval()
        self._known: dict[tuple, list[int]] = {}

    def generate(self, prompt: list[int], num_tokens: int, **kwargs) -> list[int]:
        """Greedy tokens of one prompt, the EOS included."""
        key = (tuple(prompt), num_tokens, *sorted(kwargs.items()))
        if key not in self._known:
            ids = torch.tensor([prompt])
            out = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=num_tokens, **kwargs
            )
            self._known[key] = out[0, len(prompt) :].tolist()
        return self._known[key]

    @torch.inference_mode()
    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """log_softmax [len(ids), V]: row i is what follows ids[: i + 1]."""
        return self.model(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)


def ids_of(outputs) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def as_rows(prompts: list[list[int]]) -> list[dict]:
    return [{"prompt_token_ids": prompt} for prompt in prompts]


def check_blocks(pool, requests) -> None:
    """Fail, with the numbers, if blocks of a pool were lost, doubled or miscounted."""
    used = [0] * pool.num_blocks
    for request in requests:
        for block in request.blocks:
            used[block] += 1
    wrong = [(b, used[b], pool.ref_count[b]) for b in range(1, pool.num_blocks) if used[b] != pool.ref_count[b]]
    idle = sum(count == 0 for count in used[1:])
    if wrong or idle != pool.num_free:  # raised, for pytest rewrites no assert of this module under python -O
        raise RuntimeError(
            f"KV blocks do not add up: {pool.num_free} free of {pool.num_blocks - 1}, {idle} without an owner; "
            f"(block, owners, ref_count) that differ: {wrong[:8]}"
        )
