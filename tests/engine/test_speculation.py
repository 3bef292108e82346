"""Drafts change no token: what a row gets with them is what it gets without them, in fewer steps."""

from __future__ import annotations

import itertools
import random

import pytest

from rayinfer import LLM, SamplingParams, scheduler, speculation
from rayinfer.request import EncodedRow
from rayinfer.speculation import Lookup
from tests.engine.test_triton_engine import triton_llm
from tests.engine.tiny import as_rows, ids_of, random_prompts

PROMPTS = random_prompts(5)
GREEDY = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)


@pytest.fixture(autouse=True)
def _eager_guesses(monkeypatch):
    """Tiny models repeat few long n-grams: guess from one token, and however few rows have drafts."""
    monkeypatch.setattr(speculation, "NGRAM", 1)
    monkeypatch.setattr(scheduler, "MIN_DRAFTS", 0.1)


def run(llm: LLM, params: SamplingParams, drafts: bool = True, prompts=PROMPTS):
    """Outputs, and the steps, drafts and accepted drafts that they took."""
    llm.reset_prefix_cache()
    if not drafts:
        llm.engine.scheduler.max_draft_step = 0
    before, names = llm.engine.snapshot(), ("num_steps", "num_draft_tokens", "num_accepted_tokens")
    before = [getattr(before, name) for name in names]
    outputs = llm.generate(as_rows(prompts), params, use_tqdm=False)
    return outputs, *(getattr(llm.engine.snapshot(), name) - old for name, old in zip(names, before, strict=True))


@pytest.mark.parametrize("run_ahead", [0, 1])
@pytest.mark.parametrize("family", ["gemma3", "qwen3"])
def test_equal_transformers(make_llm, reference_of, family, run_ahead):
    want = [reference_of(family).generate(prompt, 60, min_new_tokens=5) for prompt in PROMPTS]
    params = GREEDY.model_copy(update={"ignore_eos": False, "min_tokens": 5})
    llm = make_llm(family, run_ahead, max_num_seqs=64, block_size=4)
    outputs, _, num_drafts, num_accepted = run(llm, params)
    assert ids_of(outputs) == want
    assert 0 < num_accepted < num_drafts  # right ones and wrong ones


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_a_text_that_repeats_itself_takes_few_steps(make_llm, run_ahead):
    llm = make_llm("gemma3", run_ahead, max_num_seqs=64)
    (output,), num_steps, *_ = run(llm, GREEDY, prompts=PROMPTS[:1])
    ids = output.outputs[0].token_ids
    num_before = 60 - len(list(itertools.takewhile(lambda token: token == ids[-1], reversed(ids))))
    assert num_before < 20
    assert num_steps <= num_before + 10  # then 1, 3, 7, 15 and 16 tokens a step


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_drawn_rows_and_logprobs(make_llm, temperature):
    """Noise depends on seed and position: a drawn row is the same, and each token has its own log-probability."""
    params = SamplingParams(temperature=temperature, seed=3, max_tokens=60, ignore_eos=True, logprobs=2)
    llm = make_llm("gemma3", max_num_seqs=64)
    drafted, _, _, num_accepted = run(llm, params)
    plain, _, none, _ = run(llm, params, drafts=False)
    assert ids_of(drafted) == ids_of(plain)
    assert num_accepted > 0 == none
    for one, other in zip(drafted, plain, strict=True):
        for entry, same in zip(one.outputs[0].logprobs, other.outputs[0].logprobs, strict=True):
            assert {i: lp.logprob for i, lp in entry.items()} == pytest.approx(
                {i: lp.logprob for i, lp in same.items()}, abs=1e-4
            )


def test_a_row_that_ends_among_its_drafts(make_llm):
    """At a stop token in a loop, at max_tokens, at max_model_len: as without drafts, and no block is lost."""
    plain, *_ = run(make_llm("gemma3", max_num_seqs=64), GREEDY, drafts=False)
    loop = next(ids for ids in ids_of(plain) if ids[-1] == ids[-2])
    for changes, settings in (
        ({"stop_token_ids": (loop[-1],)}, {}),
        ({"max_tokens": 47}, {}),
        ({"max_tokens": None}, {"max_model_len": 90, "block_size": 4}),
    ):
        params = GREEDY.model_copy(update=changes)
        drafted, _, _, num_accepted = run(make_llm("gemma3", max_num_seqs=64, **settings), params)
        plain, *_ = run(make_llm("gemma3", max_num_seqs=64, **settings), params, drafts=False)
        assert [(o.outputs[0].token_ids, o.outputs[0].finish_reason) for o in drafted] == [
            (o.outputs[0].token_ids, o.outputs[0].finish_reason) for o in plain
        ]
        assert num_accepted > 0


def test_the_prefix_cache_holds_no_rejected_draft(make_llm, reference_of):
    """Rows that go on from an answer find its blocks, which drafts had written to, and get transformers' tokens."""
    llm = make_llm("llama", max_num_seqs=64, block_size=4)
    outputs, _, num_drafts, num_accepted = run(llm, GREEDY)
    assert num_accepted < num_drafts
    longer = [prompt + ids for prompt, ids in zip(PROMPTS, ids_of(outputs), strict=True)]
    more = llm.generate(as_rows(longer), SamplingParams(temperature=0, max_tokens=10), use_tqdm=False)
    assert all(output.num_cached_tokens > len(prompt) + 50 for output, prompt in zip(more, PROMPTS, strict=True))
    assert ids_of(more) == [reference_of("llama").generate(prompt, 10) for prompt in longer]


def test_no_drafts_where_steps_are_large_or_rows_wait(make_llm):
    llm = make_llm("gemma3", max_num_seqs=64)
    llm.engine.scheduler.max_draft_step = 2 * len(PROMPTS) - 1
    assert run(llm, GREEDY)[2] == 0
    llm = make_llm("gemma3", max_num_seqs=2)
    _, num_steps, _, _ = run(llm, GREEDY)
    assert num_steps >= 60 * 2  # drafts would need a third slot


@pytest.mark.gpu
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_on_a_gpu(folder_of, enforce_eager):
    """In CUDA graphs and without, with a step launched ahead until drafts begin."""
    llm = triton_llm(folder_of("gemma3"), max_num_seqs=64, enforce_eager=enforce_eager)
    for params in (GREEDY, GREEDY.model_copy(update={"temperature": 0.5, "seed": 3, "logprobs": 1})):
        llm.engine.scheduler.max_draft_step = 256
        drafted, _, _, num_accepted = run(llm, params)
        plain, *_ = run(llm, params, drafts=False)
        assert ids_of(drafted) == ids_of(plain)
        assert num_accepted > 0


def test_drafts_follow_the_last_place(monkeypatch):
    """As many as were told right one after the other, going round in a text that repeats itself."""
    monkeypatch.setattr(speculation, "NGRAM", 2)
    lookup = Lookup()
    lookup.learn([1, 2, 3, 9, 1, 2])
    assert lookup.guess(9) == []  # nothing was told yet
    lookup.learn([3])
    assert lookup.guess(9) == [9]
    lookup.learn([9, 1])
    assert lookup.guess(9) == [2, 3, 9]
    assert lookup.guess(2) == [2, 3]
    lookup.learn([2, 3, 9])
    assert lookup.guess(9) == [1, 2, 3, 9, 1, 2]  # the text repeats after four tokens
    lookup.learn([7])
    assert lookup.guess(9) == []  # 7 was not foreseen
    assert (lookup.streak, len(lookup.tokens)) == (0, 13)


@pytest.mark.parametrize(("num_kinds", "seed"), [(1, 0), (2, 1), (3, 2), (5, 3)])
def test_a_long_text_learned_at_once(num_kinds, seed):
    """As learned token by token: the same places, and the same drafts from there on."""
    text = random.Random(seed).choices(range(num_kinds), k=400)
    whole, parts, one_by_one = Lookup(), Lookup(), Lookup()
    whole.learn(text)
    for first, end in ((0, 2), (2, 90), (90, 320), (320, 400)):
        parts.learn(text[first:end])
    for token in text:
        one_by_one.learn([token])
    for token in [*text[150:200], *range(num_kinds)]:
        for lookup in (whole, parts):
            assert lookup._places == one_by_one._places
            assert lookup.guess(15) == one_by_one.guess(15)
            lookup.learn([token])
        one_by_one.learn([token])


@pytest.mark.parametrize("seed", range(3))
def test_a_step_with_drafts_is_read_before_the_next(make_llm, reference_of, seed):
    """A row came in with one token to compute, drafts behind it, while another one's last step was under way: that one
    was read in the place of the drafts, and the next token was computed from a draft that was wrong."""
    llm = make_llm("llama", 1, block_size=16)
    engine, draw = llm.engine, random.Random(seed)
    known = ([draw.randrange(3, 97) for _ in range(4)] * 5)[:17]  # one block, and a token
    other, last = ([draw.randrange(3, 97) for _ in range(9)] for _ in range(2))
    llm.generate(as_rows([known]), GREEDY.model_copy(update={"max_tokens": 1}), use_tqdm=False)
    engine.scheduler.all_known = False
    rows, comes = {"other": (other, 4), "known": (known, 8), "last": (last, 4)}, {0: "other", 4: "known", 5: "last"}
    found, step = {}, 0
    while engine.has_work or len(found) < 3:
        if name := comes.get(step):
            prompt, num = rows[name]
            engine.add(name, EncodedRow(list(prompt), GREEDY.model_copy(update={"max_tokens": num})))
        found |= {output.request_id: output.outputs[0].token_ids for output in engine.step()}
        step += 1
    assert found == {name: reference_of("llama").generate(*row, eos_token_id=-1) for name, row in rows.items()}
