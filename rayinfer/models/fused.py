"""Fused decoders for structures we know: Llama, Mistral, Qwen2, Qwen3 and Gemma 3 (text).

A decoder is swapped only if its class is exactly one of FUSED, so nothing unknown is swapped by accident. What changes:
QKV and gate+up are one product each, a block's last product adds to the stream itself (or, if a norm is between, the
next norm does), and q/k norm, rotary and KV write are one operation. The CausalLM around it stays transformers'.
Shapes: T tokens, C channels, M positions, R rotary size.
"""

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from rayinfer.attention.base import StepOutputs
from rayinfer.models.linear import Linear
from rayinfer.models.paged import PagedLayer
from rayinfer.ops import get_ops

# transformers' class of the decoder -> whether its norms follow Gemma's convention (1 + weight).
FUSED = {"LlamaModel": False, "MistralModel": False, "Qwen2Model": False, "Qwen3Model": False, "Gemma3TextModel": True}
PIECE = 5459  # tokens of an MLP 28,672 wide that are computed at once, or half as many again: what is wide is short
_ACT = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


class Norm(nn.Module):
    """RMSNorm, alone or with the add before it."""

    def __init__(self, norm: nn.Module, gemma: bool):
        super().__init__()
        self.weight: Tensor = norm.weight  # type: ignore[assignment]
        self.eps = float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)  # type: ignore[arg-type]
        self.gemma = gemma
        self.ops = get_ops(self.weight.device)

    def forward(self, x_TC: Tensor) -> Tensor:
        return self.ops.rms_norm(x_TC, self.weight, self.eps, gemma=self.gemma)

    def add(self, x_TC: Tensor | None, stream_TC: Tensor) -> tuple[Tensor, Tensor]:
        """Return (norm(x + stream), x + stream); without an x, (norm(stream), stream)."""
        if x_TC is None:
            return self(stream_TC), stream_TC
        return self.ops.add_rms_norm(x_TC, stream_TC, self.weight, self.eps, gemma=self.gemma)


class FusedAttention(nn.Module):
    """Merged QKV, fused q/k norm + rotary + KV write, paged attention; `out` is the product after it."""

    def __init__(self, attention: Any, gemma: bool):
        super().__init__()
        self.paged: PagedLayer = attention.paged
        self.qkv = Linear.merge([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out = Linear.merge([attention.o_proj])
        self.ops = get_ops(self.out.weight.device)
        self.norms: dict[str, Any] = {"gemma": gemma}
        if getattr(attention, "q_norm", None) is not None:
            q_norm = Norm(attention.q_norm, gemma)
            self.norms |= {"q_weight": q_norm.weight, "k_weight": attention.k_norm.weight, "eps": q_norm.eps}

    def forward(self, x_TC: Tensor, cos_MR: Tensor, sin_MR: Tensor, outputs: StepOutputs | None = None) -> Tensor:
        paged, spec, meta = self.paged, self.paged.spec, self.paged.state.meta
        q_THD = self.ops.qk_norm_rope_write(
            self.qkv(x_TC), cos_MR, sin_MR, meta.positions_T, meta.slot_mapping_T, paged.cache.k_NSKD,
            paged.cache.v_NSKD, num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim,
            **self.norms,
        )  # fmt: skip
        wanted = (q_THD, meta) if outputs is None else (q_THD[outputs.index_L], outputs.meta)
        return paged.attend(*wanted).flatten(1)


class FusedMLP(nn.Module):
    """Merged gate+up, act * mul; `down` is the product after it."""

    def __init__(self, mlp: Any, kind: str):
        super().__init__()
        self.gate_up = Linear.merge([mlp.gate_proj, mlp.up_proj])
        self.down = Linear.merge([mlp.down_proj])
        self.kind = kind
        self.ops = get_ops(self.down.weight.device)
        self.num_at_once = max(1, PIECE * 28672 // len(self.gate_up.weight))

    def forward(self, x_TC: Tensor) -> Tensor:
        return self.ops.act_mul(self.gate_up(x_TC), self.kind)


class FusedLayer(nn.Module):
    """One decoder layer. Gemma 3 norms the output of each block too, before it is added."""

    def __init__(self, layer: Any, gemma: bool, kind: str):
        super().__init__()
        self.attention = FusedAttention(layer.self_attn, gemma)
        self.mlp = FusedMLP(layer.mlp, kind)
        self.pre_attention = Norm(layer.input_layernorm, gemma)
        four = hasattr(layer, "pre_feedforward_layernorm")  # norms: before and behind each block
        self.post_attention = Norm(layer.post_attention_layernorm, gemma) if four else None
        self.pre_mlp = Norm(layer.pre_feedforward_layernorm if four else layer.post_attention_layernorm, gemma)
        self.post_mlp = Norm(layer.post_feedforward_layernorm, gemma) if four else None

    def forward(
        self, x_TC: Tensor | None, stream_TC: Tensor, cos_MR: Tensor, sin_MR: Tensor, outputs: StepOutputs | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """Take and return (what the last block gave, the stream it is still to be added to); None if it was added.

        With `outputs`, keys and values of all tokens are written, and the rest is done for the tokens it names alone.
        The stream is written to.
        """
        x_TC, stream_TC = self.pre_attention.add(x_TC, stream_TC)
        x_TC = self.attention(x_TC, cos_MR, sin_MR, outputs)
        if outputs is not None:
            stream_TC = stream_TC[outputs.index_L]
        x_TC, stream_TC = _end_block(self.attention.out, x_TC, self.post_attention, stream_TC)
        x_TC, stream_TC = self.pre_mlp.add(x_TC, stream_TC)
        num_pieces = max(1, -(-(len(x_TC) - self.mlp.num_at_once // 2) // self.mlp.num_at_once))
        pieces = zip(x_TC.chunk(num_pieces), stream_TC.chunk(num_pieces), strict=True)
        ends = [_end_block(self.mlp.down, self.mlp(x_pC), self.post_mlp, stream_pC) for x_pC, stream_pC in pieces]
        if num_pieces == 1:
            return ends[0]
        parts = [x_TC for x_TC, _ in ends if x_TC is not None]
        return torch.cat(parts) if parts else None, stream_TC


def _end_block(product: Linear, x_TI: Tensor, norm: Norm | None, stream_TC: Tensor) -> tuple[Tensor | None, Tensor]:
    """What `FusedLayer.forward` returns, of a block whose last product and norm after it are given.

    Without a norm the stream is added to in place.
    """
    return (None, product(x_TI, stream_TC)) if norm is None else (norm(product(x_TI)), stream_TC)


class FusedDecoder(nn.Module):
    """Stands where the CausalLM has its decoder. Takes the weights over and frees the originals layer by layer."""

    def __init__(self, base: Any, gemma: bool, kind: str, num_positions: int):
        super().__init__()
        self.embed_tokens = base.embed_tokens
        self.norm = Norm(base.norm, gemma)
        self.layers = nn.ModuleList()
        self._paged: PagedLayer = base.layers[-1].self_attn.paged
        for i in range(len(base.layers)):
            self.layers.append(FusedLayer(base.layers[i], gemma, kind))
            base.layers[i] = nn.Identity()
            torch.cuda.empty_cache()  # else the next layer's weights take pieces of what this one left
        # Gemma 3 has one rotary embedding for each kind of layer, the others one in all.
        kinds = base.config.layer_types if isinstance(base.rotary_emb.rope_type, dict) else [""] * len(self.layers)
        tables = {kind: _rotary_tables(base, kind, num_positions) for kind in dict.fromkeys(kinds)}
        self._tables = [tables[kind] for kind in kinds]

    def get_input_embeddings(self) -> nn.Module:
        """For models of text and images, which embed the tokens before they call their decoder."""
        return self.embed_tokens

    def forward(
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **_: Any
    ) -> BaseModelOutputWithPast:
        """Token ids [1, T] or embeddings [1, T, C] to hidden states [1, T, C]; positions come with the step.

        With `StepMeta.outputs`, [1, L, C]: nothing reads what the last layer makes of the other tokens but their KV.
        """
        stream_TC = self.embed_tokens(input_ids[0]) if inputs_embeds is None else inputs_embeds[0].clone()  # type: ignore[index]
        x_TC, outputs = None, [None] * (len(self.layers) - 1) + [self._paged.state.meta.outputs]
        for layer, table, wanted in zip(self.layers, self._tables, outputs, strict=True):
            x_TC, stream_TC = layer(x_TC, stream_TC, *table, wanted)
        return BaseModelOutputWithPast(last_hidden_state=self.norm.add(x_TC, stream_TC)[0][None])


def _rotary_tables(base: Any, kind: str, num_positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin [M, R] from the model's own rotary module, whatever scaling it does, in the model's dtype."""
    weight = base.embed_tokens.weight
    positions = torch.arange(num_positions, device=weight.device)[None]
    cos, sin = base.rotary_emb(weight.new_empty(0), positions, **({"layer_type": kind} if kind else {}))
    return cos[0].contiguous(), sin[0].contiguous()


@torch.inference_mode(False)
@torch.no_grad()
def fuse(module: nn.Module, num_positions: int) -> bool:
    """Swap the decoder inside a causal LM (after `discover`) for a fused one; False if its structure is not known.

    Args:
        num_positions: rows of the rotary tables, so the longest sequence that can run.
    """
    for path, base in list(module.named_modules()):
        gemma = FUSED.get(type(base).__name__)
        if gemma is None or type(base) is not getattr(transformers, type(base).__name__):
            continue
        config = base.config
        kind = _ACT.get(getattr(config, "hidden_activation", None) or config.hidden_act)  # type: ignore[union-attr, arg-type]
        linears = [part for part in base.layers.modules() if isinstance(part, nn.Linear)]  # type: ignore[union-attr]
        if kind is None or any(type(linear) is not nn.Linear for linear in linears):
            return False
        module.set_submodule(path, FusedDecoder(base, gemma, kind, num_positions))
        return True
    return False
