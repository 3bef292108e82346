"""Tiny random-weight models of each family, and a driver that runs rows through a Model step by step."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rayinfer.attention import StepMeta, get_backend

SHAPE = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 128, "eos_token_id": 1, "bos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
# name -> (model_type, what differs from SHAPE, whether we have a fused decoder for it)
FAMILIES = {
    "llama": ("llama", {}, True),
    "llama_biased": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, True),
    "llama3_rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
            }
        },
        True,
    ),
    "smollm": (
        "llama",
        {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 108, "tie_word_embeddings": True},
        True,
    ),
    "mistral": ("mistral", {"sliding_window": 7}, True),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}, True),
    "qwen2_sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}, True),
    "qwen3": ("qwen3", {}, True),
    "gemma3": (
        "gemma3_text",
        {
            "num_hidden_layers": 3, "sliding_window": 7, "query_pre_attn_scalar": 20, "final_logit_softcapping": 5.0,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        True,
    ),
    "gemma3_vision": (
        "gemma3",
        {
            "text_config": {**SHAPE, "sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
            "vision_config": {
                "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                "image_size": 16, "patch_size": 8,
            },
            "mm_tokens_per_image": 4, "image_token_index": 96,
        },
        True,
    ),
    "gpt2": ("gpt2", {}, False),
    "opt": ("opt", {"ffn_dim": 80, "word_embed_proj_dim": 48}, False),
    "granite": ("granite", {"logits_scaling": 2.0, "attention_multiplier": 0.3, "embedding_multiplier": 3.0}, False),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}, False),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}, False),
    "gemma2": ("gemma2", {"sliding_window": 7, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}, False),
    "phi3": ("phi3", {"sliding_window": 7}, False),
    "olmo2": ("olmo2", {}, False),
}  # fmt: skip


def tiny_model(family: str) -> torch.nn.Module:
    """A causal LM in fp32 whose norms and biases are not trivial either."""
    model_type, changes, _ = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **{**SHAPE, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(
                torch.randn(weight.shape) * 0.15 if weight.ndim > 1 else weight + torch.randn(weight.shape) * 0.2
            )
    return model.eval()


def run_rows(
    model, rows: list[list[int]], num_prompt: list[int], chunk: int, block_size: int = 4
) -> list[torch.Tensor]:
    """Logits [tokens, V] of each row: the first num_prompt tokens in chunks, the rest one by one, all rows in one step.

    Blocks are dealt out shuffled, caches start as NaN, and every step ends with two padding tokens.
    """
    num_blocks = sum(-(-len(row) // block_size) for row in rows) + 1
    free = (torch.randperm(num_blocks - 1) + 1).tolist()
    tables = [[free.pop() for _ in range(-(-len(row) // block_size))] for row in rows]
    backend = get_backend("torch", model.device)
    caches = [backend.allocate(spec, num_blocks, block_size, model.dtype, model.device) for spec in model.specs]
    for cache in caches:
        cache.k_NSKD[1:] = cache.v_NSKD[1:] = float("nan")
    model.bind(caches, backend, backend)
    done, logits = [0] * len(rows), [[] for _ in rows]
    while any(start < len(row) for start, row in zip(done, rows, strict=True)):
        step = [
            (i, min(chunk, num_prompt[i] - s) if s < num_prompt[i] else 1)
            for i, s in enumerate(done)
            if s < len(rows[i])
        ]
        step.sort(key=lambda part: done[part[0]] < num_prompt[part[0]])  # decodes first
        num_decodes = sum(done[i] >= num_prompt[i] for i, _ in step)
        ids, positions, slots, starts = [], [], [], [0]
        for i, n in step:
            span = range(done[i], done[i] + n)
            ids += rows[i][span.start : span.stop]
            positions += span
            slots += [tables[i][p // block_size] * block_size + p % block_size for p in span]
            starts.append(len(ids))
        width = max(len(table) for table in tables)
        meta = StepMeta(
            positions_T=torch.tensor(positions + [0, 0]),
            slot_mapping_T=torch.tensor(slots + [-1, -1]),
            block_table_RP=torch.tensor(
                [tables[i] + [0] * (width - len(tables[i])) for i, _ in step], dtype=torch.int32
            ),
            seq_lens_R=torch.tensor([done[i] + n for i, n in step], dtype=torch.int32),
            query_start_R1=torch.tensor(starts, dtype=torch.int32),
            num_decodes=num_decodes,
            max_seq_len=max(done[i] + n for i, n in step),
            max_query_len=max([n for i, n in step if done[i] < num_prompt[i]], default=1),
        )
        out = model.forward(torch.tensor(ids + [0, 0]), meta, torch.arange(len(ids)))
        for row, (i, n) in enumerate(step):
            logits[i].append(out[starts[row] : starts[row + 1]])
            done[i] += n
    return [torch.cat(parts) for parts in logits]


@dataclass(frozen=True)
class Family:
    name: str
    fused: bool
    folder: str

    def reference(self, **kwargs) -> torch.nn.Module:
        """transformers' own model, in fp32 with eager attention."""
        return AutoModelForCausalLM.from_pretrained(self.folder, attn_implementation="eager", **kwargs).eval()


@pytest.fixture(scope="session")
def make_family(tmp_path_factory):
    """make_family(name) -> Family, its tiny model saved once a session."""

    @functools.cache
    def make(name: str) -> Family:
        folder = str(tmp_path_factory.mktemp(name))
        tiny_model(name).save_pretrained(folder)
        return Family(name, FAMILIES[name][2], folder)

    return make


@pytest.fixture(params=FAMILIES)
def family(request, make_family) -> Family:
    return make_family(request.param)


@pytest.fixture(params=[name for name, (_, _, fused) in FAMILIES.items() if fused])
def fused_family(request, make_family) -> Family:
    return make_family(request.param)


@pytest.fixture(name="run_rows")
def _run_rows():
    return run_rows
