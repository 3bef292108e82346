"""Route transformers' attention to the paged backends, and find out what attention a model does.

transformers calls the function registered under ATTENTION for every attention module. The function hands on to the
module's `paged` attribute: a `_Recorder` while the model is looked at, a `PagedLayer` afterwards. No mask function is
registered under that name, so transformers builds no masks.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from rayinfer.attention.base import AttentionBackend, LayerCache, LayerSpec, StepMeta
from rayinfer.errors import UnsupportedModelError

ATTENTION = "rayinfer_paged"
WAY_OUT = "rayinfer runs decoders whose every layer is causal softmax attention over its own keys and values"
DYNAMIC_ROPE = ("dynamic", "longrope")  # rotary types whose angles depend on the length of the sequence
# What models pass beside (query, key, value) that does not change the result here. Anything else refuses the model.
_HARMLESS = {"dropout", "is_causal", "position_ids", "position_embeddings", "past_key_values", "cache_position"}
_HARMLESS |= {"use_cache", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits"}


@dataclass(eq=False)
class PagedState:
    """What all attention layers of one model share: caches and backends once, `meta` anew for every step."""

    specs: list[LayerSpec]
    caches: list[LayerCache] = field(default_factory=list)
    prefill: AttentionBackend = field(init=False)  # by Model.bind()
    decode: AttentionBackend = field(init=False)
    meta: StepMeta = field(init=False)  # by Model.forward()


class PagedLayer:
    """The paged attention of one layer."""

    def __init__(self, state: PagedState, layer: int):
        self.state = state
        self.spec = state.specs[layer]

    @property
    def cache(self) -> LayerCache:
        return self.state.caches[self.spec.layer]

    def attend(self, q_THD: Tensor, meta: StepMeta) -> Tensor:
        """Attend to the cache, which holds this step's keys and values already. Returns [T, H, D], contiguous."""
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        if meta.num_decodes:
            self.state.decode.decode(q_THD, self.cache, self.spec, meta, out_THD)
        if meta.seq_lens_R.shape[0] > meta.num_decodes:
            self.state.prefill.prefill(q_THD, self.cache, self.spec, meta, out_THD)
        return out_THD

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """transformers' layout: query [1, H, T, D], key and value [1, K, T, D]; returns [1, T, H, D]."""
        q_THD, k_TKD, v_TKD = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        self.state.prefill.write(k_TKD, v_TKD, self.cache, self.state.meta)
        return self.attend(q_THD, self.state.meta)[None]


class _Recorder:
    """Stands in for the attention of one module in a first forward, and notes what is asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[nn.Module, LayerSpec]] = []
        self.seen: list[Tensor] = []  # queries and keys

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *,
        scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        name = type(module).__name__
        if unknown := sorted(key for key, value in kwargs.items() if value is not None and key not in _HARMLESS):
            raise UnsupportedModelError(f"{name} wants {', '.join(unknown)} of its attention, which is not supported")
        if attention_mask is not None:
            raise UnsupportedModelError(f"{name} brings its own attention mask; {WAY_OUT}")
        if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
            raise UnsupportedModelError(f"{name} is not causal; {WAY_OUT}")
        if key.shape != value.shape or key.shape[-1] != query.shape[-1]:
            sizes = f"query {query.shape[-1]}, key {key.shape[-1]}, value {value.shape[-1]}"
            reason = f"has heads of different sizes: {sizes} (multi-head latent attention, perhaps)"
            raise UnsupportedModelError(f"{name} {reason}, which is not supported")
        if key.shape[-2] != query.shape[-2]:
            raise UnsupportedModelError(f"{name} attends to other tokens than its own; {WAY_OUT}")
        if any(module is other for other, _ in self.calls):
            raise UnsupportedModelError(f"{name} is one module used as several layers, which is not supported")
        head_dim = query.shape[-1]
        spec = LayerSpec(
            layer=len(self.calls), num_heads=query.shape[1], num_kv_heads=key.shape[1], head_dim=head_dim,
            scale=float(head_dim**-0.5 if scaling is None else scaling), sliding_window=sliding_window or None,
            softcap=softcap or None,
        )  # fmt: skip
        self.calls.append((module, spec))
        self.seen += [query, key]
        return query.new_zeros(query.transpose(1, 2).shape)  # contiguous, which some models count on


AttentionInterface.register(ATTENTION, lambda module, *args, **kwargs: (module.paged(module, *args, **kwargs), None))


@torch.inference_mode()
def discover(module: nn.Module) -> PagedState:
    """Run two tokens through a causal LM (on any device, meta too) and return the attention of its layers.

    Afterwards each attention module carries its `PagedLayer` as `.paged`.

    Raises:
        UnsupportedModelError: naming the class and what about its attention is not supported.
    """
    _spare_syncs(module)
    name, text = type(module).__name__, module.config.get_text_config()  # type: ignore[operator, union-attr]
    device = next(module.parameters()).device
    inputs = {"input_ids": torch.arange(2, device=device)[None] + text.vocab_size // 2, "use_cache": False}
    recorder = _record(module, inputs | {"position_ids": torch.arange(2, device=device)[None]})
    specs = [spec for _, spec in recorder.calls]
    _check_specs(name, text, specs)
    # Once more with the positions that the model itself gives to a row's first tokens.
    if device.type != "meta" and not all(map(torch.allclose, recorder.seen, _record(module, inputs).seen)):
        raise UnsupportedModelError(f"{name} numbers positions in a way of its own, which is not supported")
    state = PagedState(specs)
    for part, spec in recorder.calls:
        part.paged = PagedLayer(state, spec.layer)  # type: ignore[assignment]
    return state


def _record(module: nn.Module, inputs: dict[str, Any]) -> _Recorder:
    recorder, parts = _Recorder(), list(module.modules())
    for part in parts:
        part.paged = recorder  # type: ignore[assignment]
    try:
        module(**inputs)
    finally:
        for part in parts:
            del part.paged
    return recorder


def _spare_syncs(module: nn.Module) -> None:
    """Take away what reads from the device in every forward to no use here, so that a step can be captured.

    Dynamic rotary angles are constant for the lengths that load.py lets through; nothing in a step is padding of a row.
    """
    for part in module.modules():
        kind = getattr(part, "rope_type", None)
        if isinstance(kind, dict):
            kinds = {key: "default" if value in DYNAMIC_ROPE else value for key, value in kind.items()}
            part.rope_type = kinds  # type: ignore[assignment]
        elif kind in DYNAMIC_ROPE:
            part.rope_type = "default"  # type: ignore[assignment]
        if hasattr(part, "warn_if_padding_and_no_attention_mask"):
            part.warn_if_padding_and_no_attention_mask = lambda *_: None  # type: ignore[assignment]


def check_config(name: str, text: Any) -> None:
    """Refuse what the config alone shows: layers of other kinds than causal softmax attention of their own."""
    kinds = set(getattr(text, "layer_types", None) or ())
    if not kinds and getattr(text, "attention_chunk_size", None):
        kinds = {"chunked_attention"}
    if strange := sorted(kinds - {"full_attention", "sliding_attention"}):
        raise UnsupportedModelError(f"{name} has layers of kind {', '.join(strange)}; {WAY_OUT}")
    if getattr(text, "num_kv_shared_layers", None):
        raise UnsupportedModelError(f"{name} shares keys and values between layers; {WAY_OUT}")


def _check_specs(name: str, text: Any, specs: list[LayerSpec]) -> None:
    """Compare the attention that was seen with what the config promises."""
    if len(specs) != text.num_hidden_layers:
        reason = "route their attention through transformers' AttentionInterface"
        raise UnsupportedModelError(f"{name}: {len(specs)} of {text.num_hidden_layers} layers {reason}; {WAY_OUT}")
    for spec, kind in zip(specs, getattr(text, "layer_types", None) or (), strict=False):
        if (kind == "sliding_attention") != (spec.sliding_window is not None):
            reason = f"is {kind} by its config, but asks its attention for sliding_window={spec.sliding_window}"
            raise UnsupportedModelError(f"{name}: layer {spec.layer} {reason}, which is not supported")
