"""Log-probabilities equal transformers' log_softmax over the same tokens, teacher-forced."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rayinfer import SamplingParams
from tests.engine.tiny import SHAPE, as_rows, ids_of, random_prompts

PROMPTS = random_prompts(6, high=36)
TOLERANCE = 1e-4
PARAMS = [
    SamplingParams(temperature=0, max_tokens=12, logprobs=3, ignore_eos=True),
    SamplingParams(temperature=1.5, seed=7, max_tokens=12, logprobs=0, prompt_logprobs=2, ignore_eos=True),
    SamplingParams(temperature=1.0, top_k=9, max_tokens=12, logprobs=20, prompt_logprobs=0, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=12, prompt_logprobs=5, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
    # The ban of a token must not show in the log-probabilities, which are the model's.
    SamplingParams(temperature=1.0, max_tokens=12, logprobs=1, min_tokens=12, stop_token_ids=[5, 6, 7, 8, 9, 10]),
]


def _check(entry, want_V: torch.Tensor, token: int, num_top: int) -> None:
    """`entry` holds the token and the likeliest `num_top`, with values and ranks as in `want_V`."""
    top = want_V.topk(num_top)
    assert next(iter(entry)) == token
    assert set(entry) == {token, *top.indices.tolist()}
    for other, logprob in entry.items():
        assert logprob.logprob == pytest.approx(want_V[other].item(), abs=TOLERANCE)
        low = int((want_V > want_V[other] + TOLERANCE).sum()) + 1
        high = int((want_V > want_V[other] - TOLERANCE).sum())
        assert low <= logprob.rank <= high


def _check_outputs(outputs, reference) -> None:
    for output, prompt, params in zip(outputs, PROMPTS, PARAMS, strict=True):
        completion, num = output.outputs[0], len(prompt)
        assert len(completion.token_ids) == 12
        want_TV = reference.logprobs(prompt + completion.token_ids)
        if params.logprobs is None:
            assert completion.logprobs is None
            assert completion.cumulative_logprob is None
        else:
            assert len(completion.logprobs) == 12
            for i, (token, entry) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
                _check(entry, want_TV[num - 1 + i], token, params.logprobs)
            total = sum(want_TV[num - 1 + i, token].item() for i, token in enumerate(completion.token_ids))
            assert completion.cumulative_logprob == pytest.approx(total, abs=12 * TOLERANCE)
        if params.prompt_logprobs is None:
            assert output.prompt_logprobs is None
        else:
            assert len(output.prompt_logprobs) == num
            assert output.prompt_logprobs[0] is None
            for i in range(1, num):
                _check(output.prompt_logprobs[i], want_TV[i - 1], prompt[i], params.prompt_logprobs)


@pytest.mark.parametrize("run_ahead", [0, 1])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("max_num_batched_tokens", [5, None])
def test_equal_transformers(make_llm, reference_of, family, max_num_batched_tokens, run_ahead):
    """Twice, so that the second pass finds the prompts in the prefix cache (rows that want them compute anew)."""
    llm = make_llm(family, run_ahead, max_num_batched_tokens=max_num_batched_tokens, block_size=4)
    for _ in range(2):
        outputs = llm.generate(as_rows(PROMPTS), PARAMS, use_tqdm=False)
        _check_outputs(outputs, reference_of(family))


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_preempted_rows(make_llm, reference_of, run_ahead):
    """Rows lose their blocks in mid-prompt and in mid-answer; each position is reported once."""
    llm = make_llm(
        "llama", run_ahead, max_num_batched_tokens=12, block_size=4, num_gpu_blocks_override=20, max_model_len=76
    )
    outputs = llm.generate(as_rows(PROMPTS), PARAMS, use_tqdm=False)
    assert llm.engine.snapshot().num_preemptions > 0
    _check_outputs(outputs, reference_of("llama"))


def test_row_preempted_in_mid_prompt(make_llm, reference_of):
    """A row that decodes takes the blocks of a prompt whose first chunks gave log-probabilities already."""
    llm = make_llm("llama", max_num_batched_tokens=8, block_size=4, num_gpu_blocks_override=13, max_model_len=48)
    llm.engine.scheduler.all_known = False  # else the second row would wait
    prompts = [PROMPTS[0][:10], (PROMPTS[1] * 9)[:40]]
    params = [
        SamplingParams(temperature=0, max_tokens=36, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1, ignore_eos=True),
    ]
    output = llm.generate(as_rows(prompts), params, use_tqdm=False)[1]
    assert llm.engine.snapshot().num_preemptions > 0
    want_TV = reference_of("llama").logprobs(prompts[1])
    assert len(output.prompt_logprobs) == 40
    for i in range(1, 40):
        _check(output.prompt_logprobs[i], want_TV[i - 1], prompts[1][i], 1)


def test_prompt_of_one_token(make_llm):
    """Nothing comes before it: the list holds one None, as in vLLM."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=1)
    output = make_llm("llama").generate(as_rows([[7]]), params, use_tqdm=False)[0]
    assert output.prompt_logprobs == [None]


def test_asking_changes_no_token(make_llm):
    """Rows with and without log-probabilities, in one batch, draw the same tokens."""
    llm = make_llm("llama")
    plain = [params.model_copy(update={"logprobs": None, "prompt_logprobs": None}) for params in PARAMS]
    seeded = [[p.model_copy(update={"seed": i}) for i, p in enumerate(part)] for part in (PARAMS, plain)]
    asked, silent = (ids_of(llm.generate(as_rows(PROMPTS), part, use_tqdm=False)) for part in seeded)
    assert asked == silent


def test_more_than_the_vocabulary_has(make_llm, tmp_path):
    """A model of proteins has fewer tokens than a row may ask for; the step died of that row."""
    config = LlamaConfig(**{**SHAPE, "vocab_size": 12})
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    params = SamplingParams(temperature=0, max_tokens=2, logprobs=20, prompt_logprobs=20, ignore_eos=True)
    (output,) = make_llm(str(tmp_path)).generate(as_rows([[3, 4]]), params, use_tqdm=False)
    assert [len(entry) for entry in (*output.outputs[0].logprobs, output.prompt_logprobs[1])] == [12] * 3
