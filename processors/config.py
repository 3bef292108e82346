"""The settings of a processor, with the names that users of ray.data.llm type."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from rayinfer.config import EngineConfig
from rayinfer.errors import ConfigError, explain_validation
from rayinfer.processors.ray_compat import register_with_ray_data_llm
from rayinfer.sampling import SamplingParams


def bounds(value: int | tuple[int, int]) -> tuple[int, int]:
    """Smallest and largest size of a pool."""
    return (value, value) if isinstance(value, int) else value


def _check_bounds(value: int | tuple[int, int]) -> int | tuple[int, int]:
    low, high = bounds(value)
    if not 1 <= low <= high:
        raise ValueError("want a number >= 1, or (m, n) with 1 <= m <= n")
    return value


Concurrency = Annotated[int | tuple[int, int], AfterValidator(_check_bounds)]


class EngineProcessorConfig(BaseModel):
    """What `build_processor` needs to know; `ray.data.llm.build_processor` takes it too.

    Raises:
        ConfigError: naming the key, the value and what is allowed; engine_kwargs and sampling_params included.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model_source: Annotated[str, Field(description="local folder, hub id, or a single .gguf file")]
    engine_kwargs: Annotated[dict[str, Any], Field(description="fields of EngineConfig other than model")] = {}
    task_type: Annotated[Literal["generate"], Field(description="what the engine does with a row")] = "generate"
    sampling_params: Annotated[SamplingParams, Field(description="for what a row's leave open")] = SamplingParams()
    chat_template: Annotated[str | None, Field(description="Jinja2, instead of the tokenizer's own")] = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(description="passed to the chat template")] = {}
    batch_size: Annotated[int | None, Field(ge=1, description="rows of a call; default: max_num_seqs / 8")] = None
    max_concurrent_batches: Annotated[int | None, Field(ge=1, description="calls at once in one engine")] = None
    concurrency: Annotated[Concurrency, Field(description="engines: n, or (m, n) for a pool that grows")] = 1
    tokenizer_concurrency: Annotated[Concurrency, Field(description="actors that preprocess, template, tokenize")] = 1
    num_gpus: Annotated[float | None, Field(ge=0, description="of one engine; default: 1 if there are any")] = None
    num_cpus: Annotated[float | None, Field(ge=0, description="of one engine; default: 1 if enough are left")] = None
    accelerator_type: Annotated[str | None, Field(description="GPU type that engines need, such as H100")] = None
    runtime_env: Annotated[dict[str, Any] | None, Field(description="Ray runtime environment of the engines")] = None
    engine_pool: Annotated[str | None, Field(min_length=1, description="shared by processors that name it")] = None
    function_timeout_s: Annotated[float, Field(gt=0, le=1e7, description="of pre- or postprocess, for a row")] = 600.0
    on_error: Annotated[Literal["record", "raise"], Field(description="raise: a failed row stops the job")] = "record"

    def __init__(self, **data: Any):
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ConfigError(explain_validation(error, type(self), "EngineProcessorConfig")) from None
        self.engine_config()
        # Here and not at import: it costs 0.3 s, and workers never build a config.
        from rayinfer.processors.processor import build_processor

        register_with_ray_data_llm(type(self), build_processor)

    def engine_config(self) -> EngineConfig:
        """The EngineConfig of each engine."""
        if "model" in self.engine_kwargs:
            raise ConfigError("engine_kwargs: 'model' is given by model_source")
        return EngineConfig.parse(model=self.model_source, **self.engine_kwargs)
