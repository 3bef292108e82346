"""Greedy rows that ask for the very same: one of them runs, all get its answer."""

from __future__ import annotations

from rayinfer import SamplingParams
from rayinfer.request import EncodedRow
from tests.engine.tiny import as_rows, ids_of, random_prompts

GREEDY = SamplingParams(temperature=0, max_tokens=12)
PROMPTS = random_prompts(4)


def test_they_run_once(make_llm, reference_of):
    want = [reference_of("llama").generate(prompt, 12) for prompt in PROMPTS]
    llm = make_llm("llama")
    alone = llm.generate(as_rows(PROMPTS), GREEDY, use_tqdm=False)
    num_steps = llm.engine.stats.num_steps
    outputs = make_llm("llama", max_num_seqs=4).generate(as_rows(PROMPTS * 50), GREEDY, use_tqdm=False)
    assert ids_of(outputs) == want * 50
    assert [output.prompt_token_ids for output in outputs] == PROMPTS * 50
    assert [output.outputs[0].finish_reason for output in outputs] == [o.outputs[0].finish_reason for o in alone] * 50
    assert sum(output.num_cached_tokens == len(output.prompt_token_ids) for output in outputs) == 196
    assert llm.engine.stats.num_finished == 4
    many = make_llm("llama", max_num_seqs=4)
    many.generate(as_rows(PROMPTS * 50), GREEDY, use_tqdm=False)
    assert many.engine.stats.num_steps == num_steps
    assert many.engine.stats.num_finished == 200
    outputs[0].outputs[0].token_ids.append(-1)
    assert ids_of(outputs)[4] == want[0]  # no list is shared


def test_their_answers_are_their_own(make_llm):
    """Whoever changes one output, in a postprocess, changes no other."""
    params = GREEDY.model_copy(update={"logprobs": 1, "prompt_logprobs": 1})
    first, second = make_llm("llama").generate(as_rows([PROMPTS[0]] * 2), params, use_tqdm=False)
    assert (first.outputs, first.prompt_logprobs) == (second.outputs, second.prompt_logprobs)
    num = len(first.outputs[0].logprobs), len(first.prompt_logprobs)
    for values in (second.outputs[0].token_ids, second.outputs[0].logprobs, second.prompt_logprobs):
        values.clear()
    assert (len(first.outputs[0].logprobs), len(first.prompt_logprobs)) == num
    assert len(first.outputs[0].token_ids) == num[0]


def test_only_the_very_same(make_llm):
    """Other parameters, other prompts, or a draw: rows of their own."""
    llm = make_llm("llama")
    drawn = GREEDY.model_copy(update={"temperature": 1.0})
    params = [
        GREEDY,
        GREEDY.model_copy(update={"max_tokens": 3}),
        GREEDY.model_copy(update={"logprobs": 2}),
        drawn,
        drawn,
    ]
    outputs = llm.generate(as_rows([PROMPTS[0]] * 5), params, use_tqdm=False)
    first, short, logprobs, *draws = ids_of(outputs)
    assert short == first[:3]
    assert logprobs == first
    assert [output.outputs[0].logprobs is None for output in outputs[:3]] == [True, True, False]
    assert draws[0] != draws[1]  # each from a stream of its own


def test_abort_all_of_them(make_llm, reference_of):
    """Queued, running, and waiting for one like them; the engine is as good as new."""
    engine = make_llm("llama").engine
    for index in range(2_000):
        engine.add(str(index), EncodedRow(list(PROMPTS[index % 2]), GREEDY))
    engine.step()
    engine.abort_all()
    assert not engine.has_work
    assert not engine._leaders
    engine.add("0", EncodedRow(list(PROMPTS[0]), GREEDY))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert ids_of(outputs) == [reference_of("llama").generate(PROMPTS[0], 12)]
