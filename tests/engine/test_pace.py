"""Rows that are all known, the longest first, are let in at a pace with which they end together."""

from collections import deque

import numpy as np
import pytest

from rayinfer.kv_cache import BlockPool
from rayinfer.request import Request
from rayinfer.sampling import SamplingParams
from rayinfer.scheduler import Scheduler


def drive(scheduler):
    """Run all rows to their ends, each in as many steps as it has tokens; returns tokens and decodes of each step."""
    tokens, decodes, yielded, wanted = [], [], 0, sum(row.params.max_tokens for row in scheduler.waiting)
    begun = {}
    while scheduler.running or scheduler.waiting:
        step = scheduler.schedule()
        tokens.append(len(step.plan.token_ids))
        decodes.append(step.plan.num_decodes)
        for index in step.plan.samples.tolist():
            request = step.rows[index]
            request.num_pending -= 1
            request.output_token_ids.append(7)
            yielded += 1
            first = begun.setdefault(request.request_id, len(tokens))
            if request.num_known_tokens == request.max_total_tokens:
                scheduler.finish(request)
                assert scheduler.num_preemptions or len(tokens) - first == request.params.max_tokens - 1
    assert yielded == wanted
    return np.array(tokens), np.array(decodes)


def steps_of(lens, all_known, num_prompt=512, num_slots=1024, params=None, **limits):
    """Run rows of these numbers of tokens to generate; returns tokens and decodes of each step."""
    scheduler = Scheduler(BlockPool(60_000, 16, True), num_slots, 16384, **limits)
    scheduler.all_known = all_known
    for index, num in enumerate(sorted(lens, reverse=True)):
        prompt = [index * num_prompt + i for i in range(num_prompt)]
        wanted = SamplingParams(**{"temperature": 0, "max_tokens": int(num), "ignore_eos": True, **(params or {})})
        scheduler.add(Request(str(index), prompt, wanted, max_total_tokens=num_prompt + int(num)))
    return drive(scheduler)


def test_rows_end_together():
    lens = np.random.default_rng(0).integers(64, 193, 1000)
    fast, paced = steps_of(lens, False), steps_of(lens, True)
    assert len(paced[0]) == len(fast[0]) == lens.max()  # the longest row is held up by no step
    assert (paced[0][-20:] > 2 * fast[0][-20:]).all()  # its last steps are not its own
    assert np.median(paced[0]) > 2 * np.median(fast[0])
    assert np.median(paced[0][1:100]) < 16384 / 3  # prompts beside decodes, not all at once


@pytest.mark.parametrize(
    ("lens", "num_slots"),
    [
        ([100] * 300, 1024),  # all may end last: none waits
        ([1000] * 2 + [10] * 50, 1024),  # too little work for a pace
        ([1], 1024),
        ([50] * 300, 64),  # a new row has to wait for a slot
    ],
)
def test_nothing_to_spread(lens, num_slots):
    fast, paced = (steps_of(lens, all_known, num_slots=num_slots) for all_known in (False, True))
    np.testing.assert_array_equal(fast, paced)
    if len(set(lens)) == 1:  # each row may be the last
        small = steps_of(lens, True, num_slots=num_slots, mixed=(SIZES, 2**19))
        np.testing.assert_array_equal(fast, small)


def test_no_pace_for_small_models():
    """Their steps end before the host has launched the next one: the fewer steps with prompts, the better."""
    lens = np.random.default_rng(0).integers(64, 193, 1000)
    np.testing.assert_array_equal(steps_of(lens, False), steps_of(lens, True, min_pace=16_000))


SIZES = [128, 200, 256, 384, 512]


@pytest.mark.parametrize(("num_rows", "limit"), [(60, 128), (180, 200), (450, 512)])
def test_small_steps_where_the_longest_row_is_all_that_counts(num_rows, limit):
    """They are as small as is enough, and as many; no row that decodes waits."""
    lens = np.random.default_rng(0).integers(8, 1024, num_rows)
    fast = steps_of(lens, True)
    tokens, _ = steps_of(lens, True, mixed=(SIZES, 2**19))
    assert tokens[0] == limit
    assert tokens.max() <= SIZES[-1] < fast[0].max()
    assert len(tokens) <= 1.08 * len(fast[0])
    assert tokens.sum() == fast[0].sum()


def test_decodes_go_on_where_they_are_more_than_small_steps_hold():
    """Short rows came in large steps; what is left then is little, but for the rows that run."""
    lens = [*range(600, 1000, 4), *[150] * 1200]
    tokens, decodes = steps_of(lens, True, num_prompt=100, mixed=(SIZES, 2**19))
    assert max(decodes) > SIZES[0]
    assert len(tokens) <= max(lens) + 20


@pytest.mark.parametrize(
    "why",
    [
        {"mixed": (SIZES, 2**14)},  # prompts are long: each token reads those before it
        {"mixed": ([32], 2**19)},  # too much to do for such small steps
        {"params": {"prompt_logprobs": 1}},  # which no graph yields
    ],
)
def test_large_steps_all_the_same(why):
    lens = np.random.default_rng(0).integers(8, 1024, 60)
    limits = {"mixed": (SIZES, 2**19), **why}
    params = limits.pop("params", {})
    np.testing.assert_array_equal(steps_of(lens, True, params=params), steps_of(lens, True, params=params, **limits))


def test_a_job_whose_rows_seem_to_be_all():
    """They do when they are few for the slots, or when many have ended and no new one came."""
    limits = {"mixed": (SIZES, 2**19)}
    lens = np.random.default_rng(0).integers(8, 1024, 180)
    np.testing.assert_array_equal(steps_of(lens, None, **limits), steps_of(lens, True, **limits))
    lens = np.random.default_rng(0).exponential(180, 1500).clip(8, 1024).astype(int)
    seeming, known, unknown = (steps_of(lens, all_known, num_slots=600, **limits) for all_known in (None, True, False))
    assert len(seeming[0]) <= 1.01 * len(unknown[0])
    # Prompts beside decodes for the last third of the steps, not in large steps as soon as there are slots.
    prompts = [np.flatnonzero(tokens > decodes)[-1] for tokens, decodes in (seeming, known, unknown)]
    assert prompts[0] > 1.3 * prompts[2]
    assert (seeming[0][:100] == unknown[0][:100]).all()


def test_rows_of_unknown_length_do_not_wait_long():
    """They may all end early: the prompts come in steps of 256 at least."""
    lens, limits = range(100, 1000, 45), {"num_prompt": 100, "mixed": (SIZES, 2**19)}
    sure, unsure = (steps_of(lens, True, params={"ignore_eos": is_sure}, **limits)[0] for is_sure in (True, False))
    assert sure[0] == 128
    assert unsure[0] == 256
    assert unsure[9] == len(lens) < sure[9]  # no prompt is left


def run_in(num_blocks, rows, all_known=True, prefix=(), ignore_eos=True):
    """Rows of (prompt, output) tokens behind a prefix, in so many KV blocks: preemptions, and tokens computed."""
    scheduler = Scheduler(BlockPool(num_blocks, 16, True), 1024, 4096)
    scheduler.all_known = all_known
    for index, (num_prompt, num) in enumerate(sorted(rows, key=lambda row: -row[1])):
        prompt = [*prefix, *(1_000_000 + index * 1000 + i for i in range(num_prompt))]
        params = SamplingParams(temperature=0, max_tokens=int(num), ignore_eos=ignore_eos)
        scheduler.add(Request(str(index), prompt, params, max_total_tokens=len(prompt) + int(num)))
    tokens, decodes = drive(scheduler)
    return scheduler.num_preemptions, int(tokens.sum()), decodes.tolist()


@pytest.mark.parametrize("prefix", [(), tuple(range(100))])
@pytest.mark.parametrize(
    "rows",
    [
        [(100, 100)] * 60,  # nearly fit
        [(100, 100)] * 200,  # several times what fits
        [(40 + i % 90, 20 + 7 * i % 150) for i in range(150)],
    ],
)
def test_rows_that_the_cache_cannot_hold_to_their_ends(rows, prefix):
    """They come in as fast as it holds them, and few are preempted and computed anew."""
    num_blocks = 625 + len(prefix) // 16  # 10,000 tokens and the prefix
    preempted, computed, _ = run_in(num_blocks, rows, prefix=prefix)
    many, anew, _ = run_in(num_blocks, rows, all_known=False, prefix=prefix)
    least = sum(map(sum, rows)) - len(rows)
    assert many > len(rows) / 20  # what would happen
    assert preempted <= many / 2
    assert computed - least < (anew - least) / 3 + 16 * len(rows) * bool(prefix)  # what is left of a block


def test_a_long_prefix_of_all_rows_is_in_the_cache_once():
    """As many run at a time behind it as without it; counted for each row, a tenth of them would."""
    rows = [(100, 100)] * 200
    alone, behind = (np.sort(run_in(625 + len(p) // 16, rows, prefix=p)[2])[-50:].min() for p in ((), range(1600)))
    assert behind > 0.8 * alone


def test_a_pace_for_the_cache_needs_sure_lengths_and_prefixes():
    """Where rows may stop early, or share prefixes in groups, what they will need is not known: as before."""
    rows = [(100, 100)] * 200
    assert run_in(625, rows, ignore_eos=False) == run_in(625, rows, all_known=False, ignore_eos=False)
    scheduler = Scheduler(BlockPool(625, 16, True), 1024, 4096)
    scheduler.all_known = True
    for index in range(200):
        prompt = [index % 8] * 64 + list(range(36))
        params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
        scheduler.add(Request(str(index), prompt, params, max_total_tokens=200))
    while len(scheduler.running) < 8:
        assert scheduler.schedule() is not None
    assert scheduler._pace._for_kv == 0


def test_many_rows_are_seldom_looked_at():
    """100,000 waiting rows take tens of milliseconds to look through: not every 16 steps. New ones count at once."""
    scheduler, looks = Scheduler(BlockPool(60_000, 16, False), 8, 64), 0

    class Waiting(deque):
        def __iter__(self):
            nonlocal looks
            looks += 1
            return super().__iter__()

    scheduler.all_known = True
    scheduler.waiting = scheduler._pace._waiting = Waiting()
    params = SamplingParams(temperature=0, max_tokens=1000)
    for index in range(20_000):
        scheduler.add(Request(str(index), [1] * 8, params, max_total_tokens=1008))
    for step in range(72):
        for request in scheduler.schedule().rows:
            request.num_pending, request.output_token_ids = 0, request.output_token_ids + [5]
        if step == 60:
            scheduler.add(Request("new", [1] * 8, params, max_total_tokens=1008))
    assert looks == 5  # twice at the start and for the new row, once after 16 + 20 steps


def test_rows_that_end_early_hold_up_none():
    """The pace counts what rows may yield: where they stop before, nothing waits in vain."""
    scheduler = Scheduler(BlockPool(60_000, 16, False), 1024, 16384)
    scheduler.all_known = True
    for index, num in enumerate(sorted(range(100, 500), reverse=True)):
        params = SamplingParams(temperature=0, max_tokens=num)
        scheduler.add(Request(str(index), [1] * 2000, params, max_total_tokens=2000 + num))
    steps = 0
    while scheduler.running or scheduler.waiting:
        step = scheduler.schedule()
        steps += 1
        for index in step.plan.samples.tolist():
            step.rows[index].num_pending -= 1
            scheduler.finish(step.rows[index])  # after its first token
    assert steps < 300


def test_long_rows_that_come_later_do_not_end_last_of_all():
    """One that may yield 90 tokens more goes before rows that came up to 90 steps before it, not before older ones."""
    scheduler = Scheduler(BlockPool(600, 16), 2, 1000)

    def add(name, num):
        params = SamplingParams(temperature=0, max_tokens=num, ignore_eos=True)
        scheduler.add(Request(name, [1] * 20, params, max_total_tokens=20 + num))

    add("a", 10)
    add("b", 10)
    add("long", 100)
    assert [row.request_id for row in scheduler.waiting] == ["long", "a", "b"]
    for _ in range(91):
        scheduler.schedule()
        scheduler.running.clear()  # a device that is slow, and slots that nobody gives back
        scheduler._free_slots.clear()
    add("later", 100)
    assert [row.request_id for row in scheduler.waiting] == ["b", "later"]
    add("more", 102)
    assert [row.request_id for row in scheduler.waiting] == ["more", "b", "later"]
