"""Load a model: look at its files first, then bring the weights straight to the device.

`inspect_model` reads only small files and builds the module tree without memory, so that a job is refused before any
engine starts; `load_model` does the same and then loads.
"""

import contextlib
import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from rayinfer.attention import backend_name
from rayinfer.config import EngineConfig
from rayinfer.errors import ConfigError, UnsupportedModelError, nearest
from rayinfer.models.fused import FUSED, fuse
from rayinfer.models.linear import Linear, fixed_order
from rayinfer.models.model import Model, ModelInfo
from rayinfer.models.paged import ATTENTION, DYNAMIC_ROPE, WAY_OUT, check_config, discover
from rayinfer.models.source import Source, check_weights, find_source


def inspect_model(config: EngineConfig) -> ModelInfo:
    """Check that the model can run, reading no weights: seconds, no GPU.

    Raises:
        ConfigError: files missing, cut short or pickled; unknown hf_overrides; code of the model's own needed.
        UnsupportedModelError: an architecture that cannot run on the paged engine.
    """
    return _inspect(config)[2]


def load_model(config: EngineConfig, weights: Callable[[ModelInfo], dict[str, torch.Tensor]] = lambda _: {}) -> Model:
    """Load the model to its device, with paged attention, and fused if config.fuse and its structure is known.

    Args:
        weights: waits for tensors that were read ahead, and gives them away; none: read them here. It is told what to
            expect, for what can be done meanwhile.

    Raises:
        ConfigError, UnsupportedModelError: as inspect_model, and for weights that do not fit the architecture.
    """
    source, hf_config, info = _inspect(config)
    device = resolve_device(config)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device = {config.device!r}: torch sees {torch.cuda.device_count()} GPUs here")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # graphs and Triton's kernels go to the current one
    if config.load_format == "dummy":
        module = _dummy(config, hf_config, info.dtype, device)
    else:
        module = _pretrained(config, source, hf_config, info.dtype, device, weights(info))
    module.eval().requires_grad_(False)
    state = discover(module)
    fused = config.fuse and fuse(module, info.max_model_len)
    one_by_one = config.deterministic and not _fix_order(config, module, device, fused)
    return Model(info, module, state, fused, one_by_one)


@torch.no_grad()
def _fix_order(config: EngineConfig, module: nn.Module, device: torch.device, fused: bool) -> bool:
    """Let kernels that sum in one order compute the model, or return False: its tokens are to be computed one by one.

    The second is what plain torch on a CPU needs, whose products depend on the number of rows.

    Raises:
        ConfigError: other operations than those with a fixed order would take part.
    """
    names = {backend_name(name, device) for name in (config.prefill_backend, config.decode_backend)}
    if names == {"torch"} and device.type == "cpu":
        return False
    if names != {"triton"}:
        want = "prefill_backend and decode_backend must both be 'triton' (or, on a CPU, 'torch'); leave them at 'auto'"
        raise ConfigError(f"deterministic = True: {want}")
    head: Any = module.get_output_embeddings()  # type: ignore[operator]
    if not fused or type(head) is not nn.Linear:
        reason = f"{type(module).__name__} does not run on kernels of a fixed order of sums"
        raise ConfigError(f"deterministic = True: {reason}; on a GPU want fuse=True and one of {', '.join(FUSED)}")
    module.set_output_embeddings(Linear.merge([head]))  # type: ignore[operator]
    for part in module.modules():
        if isinstance(part, Linear):
            part.method = fixed_order
    return True


def resolve_device(config: EngineConfig) -> torch.device:
    """The torch device that config.device names, present or not; "auto" is a GPU if there is one here."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(config.device)
    except RuntimeError:
        raise ConfigError(f"device = {config.device!r}: want auto, cpu, cuda or cuda:N") from None


def _inspect(config: EngineConfig) -> tuple[Source, PreTrainedConfig, ModelInfo]:
    source = find_source(config.model, config.revision)
    if (config.load_format != "auto" and source.gguf_file) or (config.load_format == "dummy" and not source.local):
        raise ConfigError(f"model = {config.model!r}: load_format {config.load_format} wants a folder with config.json")
    hf_config = _override(_read_config(config, source), config.hf_overrides)
    architecture = _check_architecture(config, hf_config)
    if config.load_format != "dummy":
        check_weights(source, pickled=config.load_format == "pt")
    text = hf_config.get_text_config()
    given = [getattr(part, "eos_token_id", None) for part in (_generation_config(source, hf_config), text)]
    eos = {id for ids in given if ids is not None for id in ([ids] if isinstance(ids, int) else ids)}
    info = ModelInfo(
        architecture=architecture, vocab_size=text.vocab_size, eos_token_ids=tuple(sorted(eos)),
        max_position_embeddings=getattr(text, "max_position_embeddings", None), dtype=_dtype(config, text),
        max_model_len=_max_model_len(config, text, architecture), num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
    )  # fmt: skip
    check_config(architecture, text)
    try:
        with torch.device("meta"):
            state = discover(_from_config(config, copy.deepcopy(hf_config), info.dtype))
        info = replace(info, specs=tuple(state.specs))
    except RuntimeError:
        pass  # mixtures of experts route by values, which meta tensors lack: looked at again with the weights
    except (KeyError, TypeError, AttributeError, AssertionError) as error:
        reason = f"does not run with attention from outside, or not with this config: {error!r}"
        raise UnsupportedModelError(f"{architecture} {reason}") from error
    return source, hf_config, info


def _read_config(config: EngineConfig, source: Source) -> PreTrainedConfig:
    try:
        if source.gguf_file is not None:
            stat = (Path(source.path) / source.gguf_file).stat()
            return copy.deepcopy(_read_gguf_config(source, stat.st_mtime_ns, stat.st_size))
        options = {"trust_remote_code": config.trust_remote_code, **source.hub_kwargs()}
        return AutoConfig.from_pretrained(source.path, **options)
    except Exception as error:  # transformers, the hub and parsers raise what they like; the text is what helps
        reason = str(error).strip().split("\n")[0]
        if "trust_remote_code" in str(error):
            way_out = "read that code, then set trust_remote_code=True"
            raise ConfigError(f"model = {config.model!r}: needs Python code from its own folder; {way_out}") from None
        kind = UnsupportedModelError if "architecture" in str(error) else ConfigError
        broken = "its header cannot be read, or the file is cut short"
        what = broken if source.gguf_file else "its config cannot be read"
        raise kind(f"model = {config.model!r}: {what}: {reason}") from error


@functools.lru_cache(maxsize=4)
def _read_gguf_config(source: Source, mtime_ns: int, size: int) -> PreTrainedConfig:
    """Cached, because reading a GGUF's metadata takes seconds; the times tell a changed file."""
    return AutoConfig.from_pretrained(source.path, **source.hub_kwargs())


def _override(hf_config: PreTrainedConfig, overrides: dict[str, Any]) -> PreTrainedConfig:
    """Replace config fields; a mapping is merged into the mapping that is there."""
    if not overrides:
        return hf_config
    values = hf_config.to_dict()
    for key, value in overrides.items():
        if key not in values:
            raise ConfigError(f"hf_overrides: {type(hf_config).__name__} has no field {key!r}{nearest(key, values)}")
        old = values[key]
        values[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    try:
        if values.get("layer_types") and "layer_types" not in overrides:
            values["layer_types"] = values["layer_types"][: values["num_hidden_layers"]]
        return type(hf_config).from_dict(values)
    except Exception as error:  # the config classes validate themselves, each in its way
        raise ConfigError(f"hf_overrides = {overrides}: {type(hf_config).__name__} refuses them: {error}") from error


def _check_architecture(config: EngineConfig, hf_config: PreTrainedConfig) -> str:
    """Name of the class that will run the model, if it can be told to page its attention."""
    kind = hf_config.model_type
    if getattr(hf_config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"model_type {kind!r} is an encoder-decoder; {WAY_OUT}")
    if (quantization := getattr(hf_config, "quantization_config", None)) is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        reason = f"weights quantized by {method!r} are not supported; use the unquantized model"
        raise UnsupportedModelError(f"model = {config.model!r}: {reason}")
    if config.trust_remote_code and "AutoModelForCausalLM" in (getattr(hf_config, "auto_map", None) or {}):
        return hf_config.auto_map["AutoModelForCausalLM"].split(".")[-1]
    if type(hf_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        name = f"model_type {kind!r} ({type(hf_config).__name__})"
        raise UnsupportedModelError(f"{name} is not a causal language model; {WAY_OUT}")
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(hf_config)]
    if not model_class._supports_attention_backend:
        reason = f"does not route its attention through transformers' AttentionInterface; {WAY_OUT}"
        raise UnsupportedModelError(f"{model_class.__name__} {reason}")
    return model_class.__name__


def _max_model_len(config: EngineConfig, text: PreTrainedConfig, architecture: str) -> int:
    limit = getattr(text, "max_position_embeddings", None)
    wanted = config.max_model_len or limit
    if wanted is None:
        raise ConfigError(f"max_model_len: {architecture} names no limit of its own; set max_model_len")
    if limit is not None and wanted > limit:
        way_out = "to stretch it, override max_position_embeddings and rope_parameters with hf_overrides"
        raise ConfigError(f"max_model_len = {wanted}: {config.model!r} takes {limit} tokens at most ({way_out})")
    rope = getattr(text, "rope_parameters", None) or {}
    for values in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        static = values.get("original_max_position_embeddings") or limit or 0
        if values.get("rope_type") in DYNAMIC_ROPE and wanted > static:
            reason = f"changes with the length of a sequence beyond {static} tokens, which is not supported"
            way_out = f"set max_model_len={static} or less (now {wanted})"
            raise UnsupportedModelError(f"rope_type {values['rope_type']!r} {reason}; {way_out}")
    return wanted


def _generation_config(source: Source, hf_config: PreTrainedConfig) -> GenerationConfig:
    if source.gguf_file is None:
        with contextlib.suppress(OSError):  # many models have none
            return GenerationConfig.from_pretrained(source.path, **source.hub_kwargs())
    return GenerationConfig.from_model_config(hf_config)


def _dtype(config: EngineConfig, text: PreTrainedConfig) -> torch.dtype:
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if resolve_device(config).type == "cpu":
        return torch.float32
    dtype = text.dtype if isinstance(text.dtype, torch.dtype) else getattr(torch, text.dtype or "float32")
    return torch.bfloat16 if dtype == torch.float32 else dtype


def _from_config(config: EngineConfig, hf_config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
    code = {"trust_remote_code": config.trust_remote_code}
    return AutoModelForCausalLM.from_config(hf_config, dtype=dtype, attn_implementation=ATTENTION, **code)


def _pretrained(
    config: EngineConfig, source: Source, hf_config: PreTrainedConfig, dtype: torch.dtype, device: torch.device,
    weights: dict[str, torch.Tensor],
) -> nn.Module:  # fmt: skip
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(hf_config)] if weights else AutoModelForCausalLM
    try:
        module, report = kind.from_pretrained(
            None if weights else source.path, config=hf_config, dtype=dtype, attn_implementation=ATTENTION,
            device_map=None if device.type == "cpu" else {"": device}, trust_remote_code=config.trust_remote_code,
            use_safetensors=None if source.gguf_file else config.load_format != "pt", weights_only=True,
            output_loading_info=True, **({"state_dict": weights} if weights else source.hub_kwargs()),
        )  # fmt: skip
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, UnpicklingError) as error:
        raise ConfigError(f"model = {config.model!r}: cannot be loaded: {error}") from error
    weights.clear()  # or what is merged and freed below would live on there
    if names := sorted(map(str, report["missing_keys"] or report["mismatched_keys"])):
        reason = f"{len(names)} tensors are missing or of another shape, {names[0]} first"
        raise ConfigError(f"model = {config.model!r}: its weights do not fit {type(module).__name__}: {reason}")
    return module


def _dummy(config: EngineConfig, hf_config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Normal(0, 0.02) weights from a fixed seed, made on the device; norms as transformers initialises them."""
    with init_empty_weights(include_buffers=False):
        module: Any = _from_config(config, hf_config, dtype)
    generator = torch.Generator(device).manual_seed(0)
    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            filled = torch.empty(weight.shape, dtype=weight.dtype, device=device).normal_(0, 0.02, generator=generator)
            part.register_parameter(name, nn.Parameter(filled, requires_grad=False))
        if "Norm" in type(part).__name__:
            module._init_weights(part)
    module.tie_weights()
    return module.to(device)
