"""Settings and sampling parameters: unknown ones name the nearest, wrong ones say field, value and what is allowed."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from pydantic import ValidationError

from rayinfer import LLM, SamplingParams
from rayinfer.config import EngineConfig
from rayinfer.errors import ConfigError, ErrorType, RowError, Stage
from tests.engine.tiny import TINY


@pytest.mark.parametrize(
    ("kwargs", "texts"),
    [
        ({"max_model_lenn": 5}, ["engine: unknown key 'max_model_lenn'", "did you mean 'max_model_len'?"]),
        ({"tensor_parallel": 2}, ["unknown key 'tensor_parallel'", "Known keys: block_size, cpu_kv_cache_gib"]),
        ({"max_model_len": 1}, ["engine: max_model_len = 1", "greater than or equal to 2"]),
        ({"block_size": 0}, ["block_size = 0", "greater than or equal to 1"]),
        ({"max_num_seqs": "many"}, ["max_num_seqs = 'many'", "valid integer"]),
        ({"gpu_memory_utilization": 1.5}, ["gpu_memory_utilization = 1.5", "less than or equal to 1"]),
        ({"dtype": "int8"}, ["dtype = 'int8'", "'auto', 'float32', 'float16' or 'bfloat16'"]),
        (
            {"decode_backend": "cuda"},
            ["decode_backend = 'cuda'", "'torch', 'flash_attn' or 'flashinfer'"],
        ),
        ({"num_gpu_blocks_override": 1}, ["num_gpu_blocks_override = 1", "greater than or equal to 2"]),
        ({"cpu_kv_cache_gib": 0}, ["cpu_kv_cache_gib = 0", "greater than 0"]),
        ({"model": None}, ["model = None", "valid string"]),
        ({"seed": -1}, ["seed = -1", "greater than or equal to 0"]),
        ({"block_size": 0, "max_num_seqs": 0, "foo": 1}, ["block_size = 0", "max_num_seqs = 0", "unknown key 'foo'"]),
        ({"hf_overrides": "x" * 500}, ["hf_overrides = a str"]),
    ],
)
def test_engine_config_errors(kwargs, texts):
    with pytest.raises(ConfigError) as caught:
        EngineConfig.parse(**{"model": "m", **kwargs})
    for text in texts:
        assert text in str(caught.value)
    assert len(str(caught.value).splitlines()) == len(kwargs), "one line for each wrong key"


def test_engine_config_is_frozen_and_travels():
    config = EngineConfig.parse(model="m", max_model_len=64)
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(ValidationError):
        config.seed = 3
    with pytest.raises(ConfigError, match="model"):
        EngineConfig.parse(seed=1)


@pytest.mark.parametrize(
    ("params", "texts"),
    [
        ({"temperature": -0.1}, ["sampling_params: temperature = -0.1", "greater than or equal to 0"]),
        ({"temperature": float("nan")}, ["temperature = nan", "finite"]),
        ({"temperature": float("inf")}, ["temperature = inf"]),
        ({"temperature": "hot"}, ["temperature = 'hot'", "want a number, got str"]),
        ({"top_k": -2}, ["top_k = -2", "greater than or equal to -1"]),
        ({"top_k": 1.5}, ["top_k = 1.5", "valid integer"]),
        ({"top_p": 0}, ["top_p = 0", "greater than 0"]),
        ({"top_p": 1.01}, ["top_p = 1.01", "less than or equal to 1"]),
        ({"min_p": 2}, ["min_p = 2", "less than or equal to 1"]),
        ({"seed": 2**63}, [f"seed = {2**63}", f"less than {2**63}"]),
        ({"max_tokens": 0}, ["max_tokens = 0", "greater than or equal to 1"]),
        ({"min_tokens": 9, "max_tokens": 4}, ["min_tokens (9) is above max_tokens (4)"]),
        ({"stop": ""}, ["stop = ''", "may not be empty"]),
        ({"stop": ["a", ""]}, ["may not be empty"]),
        ({"stop": "a", "detokenize": False}, ["stop strings need detokenize=True"]),
        ({"logprobs": 21}, ["logprobs = 21", "less than or equal to 20"]),
        ({"prompt_logprobs": -1}, ["prompt_logprobs = -1"]),
        ({"temprature": 1}, ["unknown key 'temprature'", "did you mean 'temperature'?", "Known keys: detokenize"]),
        ({"n": 2}, ["unknown key 'n'"]),
        ("greedy", ["want a mapping, got str"]),
        ([1, 2], ["want a mapping, got list"]),
        ("[1, 2]", ["want a mapping, got list"]),
        ("[" * 100_000, ["want a mapping, got str"]),
        ('{"temprature": 1}', ["unknown key 'temprature'"]),
    ],
)
def test_sampling_errors(params, texts):
    with pytest.raises(RowError) as caught:
        SamplingParams.from_row(params)
    assert caught.value.type == ErrorType.INVALID_SAMPLING_PARAMS
    for text in texts:
        assert text in str(caught.value)


def test_sampling_constructor_raises_value_error():
    with pytest.raises(ValueError, match="top_p"):
        SamplingParams(top_p=3)
    with pytest.raises(ValueError, match="temprature"):
        SamplingParams(temprature=3)


def test_sampling_from_row():
    """None, a mapping as Arrow gives it, its JSON, or the object itself."""
    assert SamplingParams.from_row(None) == SamplingParams()
    params = SamplingParams(stop="a", stop_token_ids=[3], top_k=4)
    assert (params.stop, params.stop_token_ids) == (("a",), (3,))
    assert SamplingParams.from_row(params) is params
    row = {"stop": ["a"], "stop_token_ids": [np.int64(3)], "top_k": np.int32(4)}
    assert SamplingParams.from_row(row) == params
    assert SamplingParams.from_row('{"stop": ["a"], "stop_token_ids": [3], "top_k": 4}') == params
    assert SamplingParams(stop=None, stop_token_ids=None, max_tokens=None).stop == ()


def test_row_error_travels():
    error = pickle.loads(pickle.dumps(RowError(ErrorType.NAN_LOGITS, "why", Stage.ENGINE)))
    assert (error.type, str(error), error.stage) == (ErrorType.NAN_LOGITS, "why", Stage.ENGINE)
    assert RowError(ErrorType.NAN_LOGITS, "why", "nowhere").stage is None


def test_long_values_stay_out_of_the_text():
    """A row's text must not reach a log through an error."""
    with pytest.raises(RowError) as caught:
        SamplingParams.from_row({"temperature": "secret " * 20})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("kwargs", "texts"),
    [
        ({"max_model_len": 100, "num_gpu_blocks_override": 4}, ["max_model_len = 100", "holds 48 tokens"]),
        ({"max_model_len": 129}, ["max_model_len = 129", "128"]),
        ({"cpu_kv_cache_gib": 1e-9}, ["cpu_kv_cache_gib = 1e-09", "raise cpu_kv_cache_gib"]),
        ({"skip_tokenizer_init": False}, ["tokenizer", "skip_tokenizer_init=True"]),
        ({"device": "abacus"}, ["device = 'abacus'"]),
    ],
)  # fmt: skip
def test_engine_refuses(folder_of, kwargs, texts):
    with pytest.raises(ConfigError) as caught:
        LLM(folder_of("llama"), **{**TINY, "skip_tokenizer_init": True, **kwargs})
    for text in texts:
        assert text in str(caught.value)


def test_own_limit_is_lowered_to_the_cache(make_llm, caplog):
    """A limit that nobody asked for gives way, with a warning."""
    llm = make_llm("llama", num_gpu_blocks_override=4)
    assert llm.engine.max_model_len == 48
    assert "max_model_len lowered from 128 to" in caplog.text
    output = llm.generate([{"prompt_token_ids": [5] * 48}], use_tqdm=False)[0]
    assert output.error_type == "PROMPT_TOO_LONG"
