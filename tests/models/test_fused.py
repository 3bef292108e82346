"""Each swap equals the transformers block that it replaces, on random input in fp32."""

from __future__ import annotations

import copy

import pytest
import torch

from rayinfer.attention import StepMeta, get_backend
from rayinfer.config import EngineConfig
from rayinfer.models.fused import FUSED, FusedAttention, FusedLayer, FusedMLP, fuse
from rayinfer.models.linear import Linear
from rayinfer.models.load import load_model
from rayinfer.models.paged import ATTENTION, discover

T = 21


class Pair:
    """The original decoder and a copy of it, paged and bound, ready to have its blocks swapped."""

    def __init__(self, family):
        self.original = family.reference()
        self.decoder = getattr(self.original.model, "language_model", self.original.model)
        self.config = self.decoder.config
        self.gemma = FUSED[type(self.decoder).__name__]
        module = copy.deepcopy(self.original)
        module.set_attn_implementation(ATTENTION)
        state = discover(module)
        backend = get_backend("torch", torch.device("cpu"))
        state.caches = [backend.allocate(s, T // 8 + 2, 8, torch.float32, torch.device("cpu")) for s in state.specs]
        state.prefill = state.decode = backend
        state.meta = StepMeta(
            positions_T=torch.arange(T),
            slot_mapping_T=torch.arange(T) + 8,
            block_table_RP=torch.arange(1, T // 8 + 2, dtype=torch.int32)[None],
            seq_lens_R=torch.tensor([T], dtype=torch.int32),
            query_start_R1=torch.tensor([0, T], dtype=torch.int32),
            num_decodes=0,
            max_seq_len=T,
            max_query_len=T,
        )
        self.layers = getattr(module.model, "language_model", module.model).layers
        self.specs = state.specs
        kind = getattr(self.config, "hidden_activation", None) or self.config.hidden_act
        self.kind = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}[kind]

    def inputs(self, layer: int) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """Random hidden states [1, T, C], the original's (cos, sin), and the layer's additive mask."""
        x = torch.randn(1, T, self.config.hidden_size, generator=torch.Generator().manual_seed(layer))
        rotary = self.decoder.rotary_emb
        kinds = [self.config.layer_types[layer]] if isinstance(rotary.rope_type, dict) else []
        seen = torch.ones(T, T, dtype=torch.bool).tril()
        if self.specs[layer].sliding_window is not None:
            seen &= ~torch.ones(T, T, dtype=torch.bool).tril(-self.specs[layer].sliding_window)
        mask = torch.zeros(T, T).masked_fill(~seen, float("-inf"))[None, None]
        return x, rotary(x, torch.arange(T)[None], *kinds), mask


@pytest.fixture
def pair(fused_family) -> Pair:
    return Pair(fused_family)


@torch.inference_mode()
def test_attention_block(pair):
    for i, layer in enumerate(pair.decoder.layers):
        x, (cos, sin), mask = pair.inputs(i)
        expected = layer.self_attn(x, position_embeddings=(cos, sin), attention_mask=mask)[0]
        swapped = FusedAttention(pair.layers[i].self_attn, pair.gemma)
        torch.testing.assert_close(swapped.out(swapped(x[0], cos[0], sin[0])), expected[0], rtol=1e-5, atol=2e-6)


@torch.inference_mode()
def test_mlp_block(pair):
    x, _, _ = pair.inputs(0)
    expected = pair.decoder.layers[0].mlp(x)
    swapped = FusedMLP(pair.layers[0].mlp, pair.kind)
    torch.testing.assert_close(swapped.down(swapped(x[0])), expected[0], rtol=1e-5, atol=2e-6)


@torch.inference_mode()
@pytest.mark.parametrize("at_once", [T, T - 1, 8, 1])
def test_decoder_layer(pair, at_once):
    """With something that is still to be added to the stream, and without; the feed-forward block in pieces too."""
    for i, layer in enumerate(pair.decoder.layers):
        x, (cos, sin), mask = pair.inputs(i)
        expected = layer(x, position_embeddings=(cos, sin), attention_mask=mask)[0]
        swapped = FusedLayer(pair.layers[i], pair.gemma, pair.kind)
        swapped.mlp.num_at_once = at_once
        part = torch.randn(T, pair.config.hidden_size)
        for block_out, stream in ((None, x[0].clone()), (part, x[0] - part)):
            last, stream = swapped(block_out, stream, cos[0], sin[0])
            assert (last is None) is not pair.gemma
            torch.testing.assert_close(stream if last is None else last + stream, expected, rtol=1e-5, atol=1e-5)


def test_merge_keeps_bias_and_frees_the_parts():
    parts = [torch.nn.Linear(6, n) for n in (4, 2, 3)]
    x = torch.randn(5, 6)
    expected = torch.cat([part(x) for part in parts], dim=-1)
    merged = Linear.merge(parts)
    torch.testing.assert_close(merged(x), expected)
    assert all(part.weight is None for part in parts)


def test_unknown_structures_are_left_alone(make_family):
    model = make_family("olmo2").reference()
    before = {name: id(part) for name, part in model.named_modules()}
    assert fuse(model, 16) is False
    assert {name: id(part) for name, part in model.named_modules()} == before


def test_subclass_of_a_known_decoder_is_not_swapped(make_family):
    model = make_family("llama").reference()
    model.model.__class__ = type("LlamaModel", (type(model.model),), {})  # a stranger of the same name
    assert fuse(model, 16) is False


def test_tied_head_stays_tied_and_memory_is_not_doubled(make_family):
    family = make_family("smollm")
    original = family.reference()
    model = load_model(EngineConfig(model=family.folder, device="cpu"))
    assert model.module.lm_head.weight is model.module.model.embed_tokens.weight
    count = sum(p.numel() for p in original.parameters())
    assert sum(p.numel() for p in model.module.parameters()) == count
