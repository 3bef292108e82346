"""Deterministic mode: a row's tokens and log-probabilities are the same to the last bit however it is run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rayinfer import LLM, ConfigError, SamplingParams
from rayinfer.kernels import sampling
from rayinfer.models import fused
from rayinfer.ops import _triton_ops
from tests.engine.tiny import TINY, VOCAB, as_rows, random_prompts

GPU = torch.cuda.is_available()
# Of every case: how rows meet in a step, which chunks they come in, and whether they have to be computed again.
WAYS = {
    "together": {},
    "chunks": {"max_num_batched_tokens": 13},
    "no prefix cache": {"enable_prefix_caching": False, "max_num_seqs": 3},
    "starved": {},  # with hardly more blocks than one row needs
}
SMALL = {"max_model_len": 64, "block_size": 4}


def _params(num: int) -> list[SamplingParams]:
    """Greedy rows, drawn rows with a seed, drawn rows without."""
    kinds = [{"temperature": 0}, {"temperature": 1, "seed": 7}, {"temperature": 1, "top_p": 0.9, "top_k": 20}]
    return [SamplingParams(max_tokens=3 + i + i % 2, ignore_eos=True, logprobs=2, **kinds[i % 3]) for i in range(num)]


def _answers(llm: LLM, prompts: list[list[int]], params: list[SamplingParams], order=None) -> list[tuple]:
    """Everything that must not change, in the order of `prompts`."""
    order = list(range(len(prompts))) if order is None else order
    rows = as_rows([prompts[i] for i in order])
    outputs = llm.generate(rows, [params[i] for i in order], use_tqdm=False, on_error="raise")
    found = {}
    for i, output in zip(order, outputs, strict=True):
        done = output.outputs[0]
        logprobs = [{token: (one.logprob, one.rank) for token, one in entry.items()} for entry in done.logprobs]
        found[i] = (done.token_ids, logprobs)
    return [found[i] for i in range(len(prompts))]


def _check(make, num: int, low: int, high: int, num_blocks: int) -> None:
    prompts, params = random_prompts(num, low, high), _params(num)
    alone = make(max_num_seqs=1, enable_prefix_caching=False)
    want = [_answers(alone, [prompt], [one])[0] for prompt, one in zip(prompts, params, strict=True)]
    for way, settings in WAYS.items():
        llm = make(**(settings if way != "starved" else {"num_gpu_blocks_override": num_blocks}))
        llm.engine.scheduler.all_known = way != "starved"  # else rows wait there, and none gives way
        assert _answers(llm, prompts, params, np.random.default_rng(0).permutation(num).tolist()) == want, way
        if way == "starved":
            assert llm.engine.snapshot().num_preemptions > 0


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_one_by_one(make_llm, family):
    """What a CPU does by default."""
    _check(lambda **kwargs: make_llm(family, deterministic=True, **SMALL, **kwargs), 5, 10, 26, 17)


def test_unfused(make_llm):
    _check(lambda **kwargs: make_llm("qwen3", deterministic=True, fuse=False, **SMALL, **kwargs), 5, 10, 26, 17)


def test_one_by_one_gives_the_model_s_answers(make_llm, reference_of):
    prompts = random_prompts(6)
    params = [SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0, prompt_logprobs=0)] * 6
    outputs = make_llm("llama", deterministic=True).generate(as_rows(prompts), params, use_tqdm=False)
    reference = reference_of("llama")
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = output.outputs[0].token_ids
        assert ids == reference.generate(prompt, 8, eos_token_id=None, pad_token_id=0)
        want = reference.logprobs(prompt + ids)
        own = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        for position, (token, entry) in enumerate(zip([*prompt[1:], *ids], own, strict=True)):
            assert entry[token].logprob == pytest.approx(float(want[position, token]), abs=1e-4)


def _triton(folder: str, monkeypatch: pytest.MonkeyPatch, **kwargs) -> LLM:
    """The engine as on a GPU: there, or all its kernels in the interpreter, of a model of one layer."""
    device: dict = {"device": "cuda", "dtype": "float32"}
    if not GPU:
        device = {"prefill_backend": "triton", "decode_backend": "triton"}
        monkeypatch.setattr(fused, "get_ops", lambda _: _triton_ops())
        device["hf_overrides"] = {"num_hidden_layers": 1}
    settings = {**TINY, "max_num_seqs": 8, "max_model_len": 72, "skip_tokenizer_init": True, "deterministic": True}
    llm = LLM(folder, **{**settings, **device, **kwargs})
    if not GPU:
        llm.engine.runner.sampler = sampling
    return llm


@pytest.mark.usefixtures("dot_by_rows")
def test_kernels(folder_of, monkeypatch):
    _check(lambda **kwargs: _triton(folder_of("llama"), monkeypatch, **kwargs), 3, 29, 32, 6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_kernels_of_other_families(folder_of, monkeypatch, family, dtype):
    _check(lambda **kwargs: _triton(folder_of(family), monkeypatch, dtype=dtype, **kwargs), 12, 20, 32, 6)


def test_kernels_give_the_model_s_answers(folder_of, reference_of, monkeypatch):
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    llm = _triton(folder_of("qwen3"), monkeypatch, hf_overrides={})
    output = llm.generate(as_rows([[5, 9, 70]]), params, use_tqdm=False)[0]
    assert output.outputs[0].token_ids == reference_of("qwen3").generate(
        [5, 9, 70], 2, eos_token_id=None, pad_token_id=0
    )


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"prefill_backend": "triton"}, "must both be 'triton'"),
        ({"prefill_backend": "triton", "decode_backend": "triton", "fuse": False}, "want fuse=True and one of Llama"),
    ],
)
def test_what_cannot_be_is_refused(folder_of, settings, text):
    with pytest.raises(ConfigError, match=f"deterministic = True: .*{text}"):
        LLM(folder_of("llama"), **TINY, skip_tokenizer_init=True, deterministic=True, **settings)


def test_a_row_without_a_seed_goes_by_its_prompt(make_llm):
    """Not by the number of rows before it, as in the other mode."""
    prompt, params = [3 + i % (VOCAB - 3) for i in range(12)], SamplingParams(temperature=1, max_tokens=12)
    found = {}
    for mode in (True, False):
        llm = make_llm("llama", deterministic=mode)
        found[mode] = [llm.generate(as_rows([prompt]), params, use_tqdm=False)[0].outputs[0].token_ids for _ in "12"]
    assert found[True][0] == found[True][1]
    assert found[False][0] != found[False][1]
