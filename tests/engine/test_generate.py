"""Greedy tokens equal transformers' generate, however the rows are cut into steps and blocks."""

from __future__ import annotations

import weakref

import pytest

from rayinfer import LLM, SamplingParams
from tests.engine.tiny import TINY, as_rows, ids_of, random_prompts

PROMPTS = random_prompts(8)
GREEDY = SamplingParams(temperature=0, max_tokens=20)

ALL = [("llama", budget, block_size) for budget in (5, 16, None) for block_size in (4, 16, 32)]
SOME = [(family, *cut) for family in ("gemma3", "qwen3") for cut in ((5, 16), (16, 4), (None, 32))]


@pytest.mark.parametrize(("family", "max_num_batched_tokens", "block_size"), ALL + SOME)
def test_equals_transformers(make_llm, reference_of, family, max_num_batched_tokens, block_size):
    """The second pass runs one step ahead and finds its prompts in the prefix cache."""
    want = [reference_of(family).generate(prompt, 20) for prompt in PROMPTS]
    assert len({token for tokens in want for token in tokens}) > 30, "the model must not repeat itself"
    llm = make_llm(family, max_num_batched_tokens=max_num_batched_tokens, block_size=block_size)
    for run_ahead in (0, 1):
        llm.engine.runner.run_ahead = run_ahead
        outputs = llm.generate(as_rows(PROMPTS), GREEDY, use_tqdm=False)
        assert ids_of(outputs) == want
        assert [o.outputs[0].finish_reason for o in outputs] == ["stop" if 1 in tokens else "length" for tokens in want]
    cached = [output.num_cached_tokens for output in outputs]
    assert cached == [(len(prompt) - 1) // block_size * block_size for prompt in PROMPTS]


@pytest.mark.parametrize("run_ahead", [0, 1])
@pytest.mark.parametrize(("max_num_seqs", "enable_prefix_caching"), [(1, True), (1, False), (8, False), (3, True)])
def test_batch_and_prefix_cache_change_nothing(make_llm, reference_of, max_num_seqs, enable_prefix_caching, run_ahead):
    want = [reference_of("llama").generate(prompt, 20) for prompt in PROMPTS]
    llm = make_llm(
        "llama", run_ahead, max_num_seqs=max_num_seqs, enable_prefix_caching=enable_prefix_caching, block_size=4
    )
    outputs = llm.generate(as_rows(PROMPTS), GREEDY, use_tqdm=False)
    assert ids_of(outputs) == want
    assert any(o.num_cached_tokens for o in outputs) == enable_prefix_caching


@pytest.mark.parametrize("run_ahead", [0, 1])
@pytest.mark.parametrize(
    ("family", "enable_prefix_caching", "max_num_batched_tokens"),
    [("llama", True, 7), ("llama", False, None), ("gemma3", True, None), ("qwen3", False, 16)],
)
def test_preempted_rows(make_llm, reference_of, family, enable_prefix_caching, max_num_batched_tokens, run_ahead):
    """A pool of 84 tokens for rows of up to 80: rows lose their blocks and start again."""
    want = [reference_of(family).generate(prompt, 20, min_new_tokens=20) for prompt in PROMPTS]
    llm = make_llm(
        family,
        run_ahead,
        enable_prefix_caching=enable_prefix_caching,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=4,
        num_gpu_blocks_override=22,
        max_model_len=84,
    )
    params = SamplingParams(temperature=0, max_tokens=20, min_tokens=20)
    assert ids_of(llm.generate(as_rows(PROMPTS), params, use_tqdm=False)) == want
    assert llm.engine.snapshot().num_preemptions > 0


def test_transformers_own_blocks(make_llm, reference_of):
    """fuse=False runs transformers' decoder on the same cache."""
    want = [reference_of("llama").generate(prompt, 20) for prompt in PROMPTS]
    llm = make_llm("llama", fuse=False, max_num_batched_tokens=16, block_size=4)
    assert ids_of(llm.generate(as_rows(PROMPTS), GREEDY, use_tqdm=False)) == want


def test_rows_join_a_running_batch(make_llm, reference_of):
    """Rows added while others decode get the same tokens, and the engine hands each out once."""
    want = [reference_of("llama").generate(prompt, 20) for prompt in PROMPTS]
    engine = make_llm("llama", run_ahead=1, block_size=4, max_num_batched_tokens=16).engine
    got: dict[str, list[int]] = {}
    counted: list[tuple[int, int]] = []
    waiting = list(range(len(PROMPTS)))
    while waiting or engine.has_work:
        if (waiting and engine.stats.num_steps % 3 == 0) or not engine.has_work:
            index = waiting.pop(0)
            row = {"prompt_token_ids": PROMPTS[index], "sampling_params": GREEDY}
            engine.add(str(index), engine.inputs.encode_batch([row])[0])
        for output in engine.step():
            assert output.request_id not in got
            got[output.request_id] = output.outputs[0].token_ids
        counted.append((len(got), engine.snapshot().num_generated_tokens))
    assert [got[str(index)] for index in range(len(PROMPTS))] == want
    stats = engine.snapshot()
    assert (stats.num_finished, stats.num_failed, stats.num_running, stats.num_waiting) == (len(PROMPTS), 0, 0, 0)
    assert stats.num_prompt_tokens == sum(map(len, PROMPTS))
    assert stats.num_generated_tokens == sum(map(len, want))
    assert any(tokens > 1 for ended, tokens in counted if not ended)  # as they come, not as rows end


def test_max_model_len_ends_rows(make_llm, reference_of):
    """max_tokens None runs to the limit; a prompt of max_model_len - 1 tokens yields exactly one."""
    llm = make_llm("llama", max_model_len=40)
    prompts = [PROMPTS[0][:5], (PROMPTS[0] * 9)[:39], (PROMPTS[0] * 9)[:40]]
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    outputs = llm.generate(as_rows(prompts), params, use_tqdm=False)
    assert [len(ids) for ids in ids_of(outputs)] == [35, 1, 0]
    assert [o.outputs[0].finish_reason for o in outputs] == ["length", "length", "error"]
    assert outputs[2].error_type == "PROMPT_TOO_LONG"
    reference = reference_of("llama")
    assert ids_of(outputs)[0] == reference.generate(prompts[0], 35, eos_token_id=-1)
    assert ids_of(outputs)[1] == reference.generate(prompts[1], 1, eos_token_id=-1)


def test_memory_is_given_back(folder_of):
    """In a notebook, the next LLM wants the memory of the one before; its parts refer to each other in circles."""
    llm = LLM(folder_of("llama"), skip_tokenizer_init=True, **TINY)
    module, pool = weakref.ref(llm.engine.model.module), weakref.ref(llm.engine.pool)
    assert module() is not None
    llm.generate(as_rows(random_prompts(2)), SamplingParams(max_tokens=2, detokenize=False), use_tqdm=False)
    del llm
    assert module() is pool() is None


def test_a_row_without_parameters_of_its_own_has_the_calls(make_llm):
    """Rows of a table have None there, and were sampled with the defaults."""
    rows = [{"prompt_token_ids": PROMPTS[0]}, {"prompt_token_ids": PROMPTS[0], "sampling_params": None}]
    llm = make_llm("llama")
    plain, none = ids_of(llm.generate(rows, GREEDY, use_tqdm=False))
    assert plain == none
    own = [{"top_k": 1, "max_tokens": None}, {"top_k": None, "max_tokens": 3}]  # as the rows of Arrow's structs are
    rows = [{"prompt_token_ids": [5], "sampling_params": {**params, "ignore_eos": True}} for params in own]
    assert [len(ids) for ids in ids_of(llm.generate(rows, use_tqdm=False))] == [16, 3]
