"""Logits of every family equal transformers' own forward in fp32, fused and through the interface alone."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rayinfer.config import EngineConfig
from rayinfer.models.load import load_model
from rayinfer.models.paged import ATTENTION, discover


def random_rows() -> tuple[list[list[int]], list[int]]:
    """Rows that end at, before and after block and window borders, and how much of each is prompt."""
    generator = torch.Generator().manual_seed(1)
    sizes, prompts = [23, 9, 4, 16], [13, 9, 1, 8]
    return [torch.randint(3, 97, (n,), generator=generator).tolist() for n in sizes], prompts


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("chunk", [100, 5, 1], ids=["whole", "chunks", "single"])
def test_logits_equal_transformers(family, run_rows, fuse, chunk):
    model = load_model(EngineConfig(model=family.folder, fuse=fuse, device="cpu"))
    assert model.fused == (fuse and family.fused)
    rows, prompts = random_rows()
    reference = family.reference()
    for row, logits in zip(rows, run_rows(model, rows, prompts, chunk), strict=True):
        with torch.no_grad():
            expected = reference(torch.tensor([row])).logits[0]
        assert expected.abs().max() > 0.5  # logits of nothing would agree with anything
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_bfloat16_is_as_close_as_transformers_bfloat16(fused_family, run_rows):
    """Fused bf16 differs from fp32 no more than transformers' own bf16 does (half as much again, for luck)."""
    model = load_model(EngineConfig(model=fused_family.folder, dtype="bfloat16", device="cpu"))
    rows, prompts = random_rows()
    exact, rounded = fused_family.reference(), fused_family.reference(dtype=torch.bfloat16)
    ours, theirs = [], []
    for row, logits in zip(rows, run_rows(model, rows, prompts, 5), strict=True):
        assert logits.dtype == torch.bfloat16
        with torch.no_grad():
            expected = exact(torch.tensor([row])).logits[0]
            theirs.append((rounded(torch.tensor([row])).logits[0] - expected).square().flatten())
        ours.append((logits - expected).square().flatten())
    assert torch.cat(ours).mean().sqrt() < 1.5 * torch.cat(theirs).mean().sqrt()


def test_without_index_all_logits_come_back(make_family, run_rows):
    model = load_model(EngineConfig(model=make_family("llama").folder, device="cpu"))
    row = [5, 6, 7, 8]
    (indexed,) = run_rows(model, [row], [4], 4)
    meta = model._state.meta
    everything = model.forward(torch.tensor(row + [0, 0]), meta)
    assert everything.shape == (6, 97)
    torch.testing.assert_close(everything[:4], indexed)


def test_forward_needs_no_host_sync(family):
    """Meta tensors have no values to read, so a forward that runs on them can be captured as a CUDA graph."""
    config = AutoConfig.from_pretrained(family.folder)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
        index = torch.zeros(1, dtype=torch.int64)
    if family.name == "qwen3_moe":  # routes by values: runs, but not on meta tensors
        with pytest.raises(RuntimeError):
            discover(module)
        return
    state = discover(module)
    assert len(state.specs) == config.get_text_config().num_hidden_layers
    for part in module.modules():
        if "paged" in vars(part):
            part.paged = lambda module, query, key, value, *_, **__: torch.empty_like(query).transpose(1, 2)
    tokens = torch.zeros((1, 3), dtype=torch.int64, device="meta")
    logits = module(input_ids=tokens, position_ids=tokens, use_cache=False, logits_to_keep=index).logits
    assert logits.shape == (1, 1, 97)
