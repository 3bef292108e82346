"""The engine with its Triton kernels, on a GPU or in the interpreter, against transformers and the torch backend."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rayinfer import LLM, SamplingParams, groups
from rayinfer.kernels import sampling
from tests.engine.tiny import TINY, VOCAB, as_rows, ids_of

GPU = torch.cuda.is_available()
NUM_ROWS = 24 if GPU else 10
SHARED = 32


def prompts() -> list[list[int]]:
    """Of three rows, one begins with a prefix, one with another, one with none."""
    rng = np.random.default_rng(0)
    shared = [rng.integers(3, VOCAB, SHARED).tolist(), rng.integers(3, VOCAB, SHARED + 16).tolist(), []]
    return [shared[i % 3] + rng.integers(3, VOCAB, 3 + i).tolist() for i in range(NUM_ROWS)]


def params() -> list[SamplingParams]:
    """Greedy and drawn rows side by side, so that a parameter read from the wrong row shows."""
    kinds = [
        {"temperature": 0},
        {"temperature": 1.3, "top_k": 7},
        {"temperature": 0},
        {"temperature": 0.7, "top_p": 0.8},
    ]
    return [
        SamplingParams(seed=i, max_tokens=4 + i % 5, ignore_eos=True, min_p=0.05 * (i % 2), **kinds[i % 4])
        for i in range(NUM_ROWS)
    ]


def triton_llm(folder: str, **kwargs) -> LLM:
    device = {"device": "cuda"} if GPU else {"prefill_backend": "triton", "decode_backend": "triton"}
    settings = {**TINY, "max_num_seqs": 8, "max_model_len": 128, "dtype": "float32", "skip_tokenizer_init": True}
    llm = LLM(folder, **{**settings, **device, **kwargs})
    if not GPU:
        llm.engine.runner.sampler = sampling
    return llm


@pytest.fixture
def _small_groups(monkeypatch):
    monkeypatch.setattr(groups, "MIN_SHARED_TOKENS", 16)
    monkeypatch.setattr(groups, "MIN_SAVING", 0.0)


WAYS = {
    "groups": {},
    "eager": {"enforce_eager": True},
    "no cache": {"enable_prefix_caching": False},
    "chunks": {"max_num_batched_tokens": 24},
    "prompts in graphs": {"max_num_seqs": 256, "max_num_batched_tokens": 24},
}


@pytest.mark.usefixtures("_small_groups")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "family", [pytest.param("llama"), *(pytest.param(f, marks=pytest.mark.gpu) for f in ("qwen3", "gemma3"))]
)
def test_tokens(folder_of, reference_of, family, way):
    llm, num_grouped, num_mixed = triton_llm(folder_of(family), **WAYS[way]), 0, 0
    launch, graphs = llm.engine.runner.launch, llm.engine.runner.graphs

    def counting(plan):
        nonlocal num_grouped, num_mixed
        num_grouped += len(plan.group_lens) > 0
        num_mixed += 0 < plan.num_decodes < len(plan.slots) and graphs is not None and graphs.takes(plan)
        return launch(plan)

    llm.engine.runner.launch = counting
    got = ids_of(llm.generate(as_rows(prompts()), params(), use_tqdm=False))
    torch_llm = LLM(folder_of(family), **TINY, max_model_len=128, skip_tokenizer_init=True)
    assert got == ids_of(torch_llm.generate(as_rows(prompts()), params(), use_tqdm=False))
    for row in range(0, NUM_ROWS, 2):
        assert got[row] == reference_of(family).generate(
            prompts()[row], params()[row].max_tokens, eos_token_id=None, pad_token_id=0
        )
    assert (num_grouped > 0) == (way != "no cache")
    assert (num_mixed > 0) == (way == "prompts in graphs" and GPU) or way == "chunks"


@pytest.mark.gpu
@pytest.mark.usefixtures("_small_groups")
def test_logprobs_in_graphs(folder_of):
    """Rows that ask for log-probabilities, or ban tokens, take another graph than the rest."""
    asked = [one.model_copy(update={"logprobs": 3, "min_tokens": i % 4}) for i, one in enumerate(params())]
    outputs = triton_llm(folder_of("llama")).generate(as_rows(prompts()), asked, use_tqdm=False)
    torch_llm = LLM(folder_of("llama"), **TINY, max_model_len=128, skip_tokenizer_init=True)
    for output, want in zip(outputs, torch_llm.generate(as_rows(prompts()), asked, use_tqdm=False), strict=True):
        assert output.outputs[0].token_ids == want.outputs[0].token_ids
        assert output.outputs[0].cumulative_logprob == pytest.approx(want.outputs[0].cumulative_logprob, abs=1e-3)
