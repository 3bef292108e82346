"""Engine configuration. Names are vLLM's where vLLM has the setting."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rayinfer.errors import ConfigError, explain_validation

BackendName = Literal["auto", "triton", "torch", "flash_attn", "flashinfer"]


class EngineConfig(BaseModel):
    """Everything that an engine replica can be told; only `model` has no default.

    Raises:
        ConfigError: from `parse`, naming the key, the value and what is allowed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: Annotated[str, Field(description="local folder, hub id, or a single .gguf file")]
    tokenizer: Annotated[str | None, Field(description="folder or hub id; default: the model's own")] = None
    revision: Annotated[str | None, Field(description="hub revision of model and tokenizer")] = None
    # auto: the checkpoint's on a GPU (fp32 there becomes bf16), float32 on a CPU
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    device: Annotated[str, Field(description="auto: cuda if there is one, else cpu")] = "auto"
    load_format: Literal["auto", "pt", "dummy"] = "auto"  # pt: pytorch_model.bin, a pickle; dummy: random weights
    skip_tokenizer_init: Annotated[bool, Field(description="only prompt_token_ids in, no text out")] = False
    trust_remote_code: Annotated[bool, Field(description="run Python code from the model folder")] = False
    hf_overrides: Annotated[dict[str, Any], Field(description="model config fields to replace")] = {}
    max_model_len: Annotated[int | None, Field(ge=2, description="prompt plus output tokens of one row")] = None
    max_num_seqs: Annotated[int | None, Field(ge=1, description="rows running at once; default by device")] = None
    max_num_batched_tokens: Annotated[int | None, Field(ge=1, description="in one step; default by device")] = None
    block_size: Annotated[int, Field(ge=1, description="tokens in one KV block; 16, 32, 64 or 128 on a GPU")] = 16
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1, description="share of the GPU's memory to use")] = 0.92
    num_gpu_blocks_override: Annotated[int | None, Field(ge=2, description="KV blocks, instead of measuring")] = None
    cpu_kv_cache_gib: Annotated[float | None, Field(gt=0, description="default: a quarter of the free, <= 4")] = None
    num_threads: Annotated[int | None, Field(ge=1, description="torch threads on a CPU; default: all cores")] = None
    enable_prefix_caching: Annotated[bool, Field(description="share KV blocks between equal prefixes")] = True
    prefill_backend: Annotated[BackendName, Field(description="attention for prompt chunks")] = "auto"
    decode_backend: Annotated[BackendName, Field(description="attention for single tokens")] = "auto"
    fuse: Annotated[bool, Field(description="swap known blocks for fused ones; False: transformers' own")] = True
    deterministic: Annotated[bool, Field(description="the same bits for a row in any batch; slower")] = False
    enforce_eager: Annotated[bool, Field(description="no CUDA graphs")] = False
    seed: Annotated[int, Field(ge=0, lt=2**63, description="random streams of rows that bring no seed")] = 0

    @classmethod
    def parse(cls, **kwargs: Any) -> Self:
        """Validate keyword arguments, with errors a person can act on."""
        try:
            return cls(**kwargs)
        except ValidationError as error:
            raise ConfigError(explain_validation(error, cls, "engine")) from None
