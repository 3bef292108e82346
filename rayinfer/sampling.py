"""What one row asks of the sampler. Names and meanings are vLLM's."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, field_validator, model_validator

from rayinfer.errors import ErrorType, RowError, explain_validation

MAX_LOGPROBS = 20
_NUMBERS = ("temperature", "top_k", "top_p", "min_p", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs")


class SamplingParams(BaseModel):
    """Sampling parameters of one row.

    The order of the filters is temperature, top-k, top-p over what top-k left, min-p, as in transformers (vLLM applies
    min-p first, and top-p to what it left); the token is then drawn by Gumbel-max with noise that depends on (seed,
    position, token) alone, so a row with a seed gives the same tokens in any batch. Log-probabilities are those of the
    model before temperature and filters.

    Raises:
        RowError: INVALID_SAMPLING_PARAMS, naming each wrong field (`from_row` only; the constructor
            raises pydantic's ValidationError, a ValueError).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)

    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False, description="0 is greedy")] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31, description="keep the k likeliest tokens; 0 and -1 keep all")] = 0
    top_p: Annotated[float, Field(gt=0, le=1, description="keep the likeliest tokens that hold this mass")] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1, description="drop tokens below this share of the likeliest")] = 0.0
    seed: Annotated[int | None, Field(ge=0, lt=2**63, description="the row's own random stream")] = None
    max_tokens: Annotated[int | None, Field(ge=1, description="None: up to max_model_len")] = 16
    min_tokens: Annotated[int, Field(ge=0, description="no EOS, ignored or not, or stop token before this many")] = 0
    stop: Annotated[tuple[str, ...], Field(description="strings that end the row")] = ()
    stop_token_ids: Annotated[tuple[int, ...], Field(description="token ids that end the row")] = ()
    include_stop_str_in_output: StrictBool = False
    ignore_eos: StrictBool = False
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS, description="top-n per generated token")] = None
    prompt_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS, description="top-n per prompt token")] = None
    skip_special_tokens: StrictBool = True
    detokenize: StrictBool = True

    @field_validator(*_NUMBERS, mode="before")
    @classmethod
    def _only_numbers(cls, value: Any) -> Any:
        if isinstance(value, bool | str | bytes):  # pydantic would make numbers of them
            raise ValueError(f"want a number, got {type(value).__name__}")
        return value.item() if isinstance(value, np.generic) else value

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_as_tuple(cls, value: Any) -> Any:
        value = () if value is None else (value,) if isinstance(value, str | bytes) else value
        if isinstance(value, Sequence):
            for text in value:
                if not isinstance(text, str) or text.encode(errors="ignore").decode() != text:
                    raise ValueError("want strings that can be written as UTF-8")
                if not text:
                    raise ValueError("a stop string may not be empty")
        return value

    @field_validator("stop_token_ids", mode="before")
    @classmethod
    def _ids_as_tuple(cls, value: Any) -> Any:
        value = () if value is None else value.tolist() if isinstance(value, np.ndarray) else value
        if isinstance(value, Sequence) and any(isinstance(item, bool | str | bytes) for item in value):
            raise ValueError("want token ids, integers")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens})")
        if self.stop and not self.detokenize:
            raise ValueError("stop strings need detokenize=True")
        return self

    @classmethod
    def from_row(cls, value: Any) -> Self:
        """Validate what a row carries: None (defaults), a mapping, one as JSON, or a SamplingParams."""
        if isinstance(value, cls):
            return value
        try:
            value = json.loads(value) if isinstance(value, str) else value
            return cls.model_validate({} if value is None else dict(value))
        except ValidationError as error:
            message = explain_validation(error, cls, "sampling_params")
        except (TypeError, ValueError, RecursionError):
            message = f"sampling_params: want a mapping, got {type(value).__name__}"
        raise RowError(ErrorType.INVALID_SAMPLING_PARAMS, message)
