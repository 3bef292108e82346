"""Random rows through the real engine loop and scheduler, on a device that checks every step it is given.

The device answers with a function of a row's whole prefix, which it reads from the KV memory that the plan points at. A
wrong block, a missing or doubled write, a stale slot or a lost token changes the answer, and the expected one is worked
out apart.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, target
from hypothesis import strategies as st

from rayinfer import groups
from rayinfer.config import EngineConfig
from rayinfer.engine import Engine
from rayinfer.kv_cache import BlockPool
from rayinfer.plan import DEVICE_TOKEN, StepPlan
from rayinfer.request import EncodedRow
from rayinfer.runner import StepResult
from rayinfer.runner.runner import TopLogprobs
from rayinfer.sampling import SamplingParams
from rayinfer.scheduler import PROMPT_LOGPROB_CHUNK, Scheduler
from tests.engine.tiny import EOS, TINY, as_rows, check_blocks, ids_of, random_prompts

NAN = -1


def answer(prefix: tuple[int, ...], banned: frozenset[int]) -> int:
    """The token that follows a prefix: one of 12, mostly the one that the last two say, now and then NaN."""
    rng = random.Random(repr(prefix))
    if (chance := rng.random()) < 0.01:
        return NAN
    if chance < 0.8:
        rng = random.Random(repr(prefix[-2:]))
    return rng.choice([token for token in range(12) if token not in banned])


@dataclass
class Handle:
    result: StepResult

    def read(self) -> StepResult:
        return self.result


@dataclass
class Device:
    """Memory cells hold the whole prefix that ends at them, as KV does in effect."""

    max_num_seqs: int
    budget: int
    num_blocks: int
    block_size: int
    run_ahead: int
    max_draft_step: int = 0
    memory: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    table: dict[tuple[int, int], int] = field(default_factory=dict)
    last: dict[int, int] = field(default_factory=dict)
    seeds: dict[int, int] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)  # seeds of rows as they came in
    limits: dict[int, int] = field(default_factory=dict)  # seed -> most tokens, whose last one is never computed

    def launch(self, plan: StepPlan) -> Handle:
        self._check(plan)
        for slot, index, block in plan.new_blocks.tolist():
            self.table[slot, index] = block
        for slot, *_, seed in plan.new_rows:
            self.seeds[slot] = seed
            if seed not in self.order:
                self.order.append(seed)
        prefixes, fed = self._write(plan)
        tokens = []
        for number, row in enumerate(plan.samples.tolist()):
            banned = frozenset(token for at, token in plan.banned.tolist() if at == number)
            tokens.append(answer(prefixes[row], banned))
            self.last[int(plan.slots[row])] = max(tokens[-1], 0)
        tops = None
        if len(plan.prompt_targets):
            values = [[float(fed[at]), 1.0] for at, _ in plan.prompt_targets.tolist()]
            tops = TopLogprobs(np.array(values, np.float32), np.zeros((len(values), 0), np.int64))
        return Handle(StepResult(np.array(tokens, np.int32), None, tops))

    def _check(self, plan: StepPlan) -> None:
        slots, num_new = plan.slots.tolist(), plan.num_new.tolist()
        assert slots
        cells = list(zip(slots, plan.starts.tolist(), strict=True))
        assert len(set(cells)) == len(cells)
        if len(set(slots)) < len(slots):  # drafts: each behind the row it goes on from, on tokens that are known
            assert plan.num_decodes == len(slots) == len(plan.samples) <= self.max_draft_step
            assert min(plan.token_ids) >= 0
            for (slot, start), before in zip(cells[1:], cells, strict=False):
                assert (slot, start - 1) == before or (slot not in slots[: cells.index((slot, start))])
        assert set(slots) <= set(range(self.max_num_seqs))
        assert sum(num_new) == len(plan.token_ids) <= self.budget
        assert set(num_new[: plan.num_decodes]) <= {1}
        assert all(num > 1 for num in num_new[plan.num_decodes :])
        assert plan.samples.tolist() == sorted(set(plan.samples.tolist()))
        new_slots = [slot for slot, *_ in plan.new_rows]
        assert len(set(new_slots)) == len(new_slots)
        assert set(new_slots) <= set(slots)
        entries = [(slot, index) for slot, index, _ in plan.new_blocks.tolist()]
        assert len(set(entries)) == len(entries)
        assert all(0 < block < self.num_blocks for *_, block in plan.new_blocks.tolist())
        for array in (
            plan.slots,
            plan.starts,
            plan.num_new,
            plan.token_ids,
            plan.samples,
            plan.new_blocks,
            plan.banned,
            plan.shared_lens,
            plan.group_starts,
            plan.group_lens,
        ):
            assert array.dtype == np.int32
        self._check_groups(plan)

    def _check_groups(self, plan: StepPlan) -> None:
        """Rows of a group must have the blocks in common that it is said to share, and more tokens than those."""
        shared = [0] * plan.num_decodes
        for start, stop, length in zip(plan.group_starts[:-1], plan.group_starts[1:], plan.group_lens, strict=True):
            assert length % self.block_size == 0
            shared[start:stop] = [length] * (stop - start)
            new = {(slot, index): block for slot, index, block in plan.new_blocks.tolist()}
            for index in range(length // self.block_size):
                cells = [(int(slot), index) for slot in plan.slots[start:stop]]
                assert len({new.get(cell, self.table.get(cell)) for cell in cells}) <= 1
        assert plan.shared_lens.tolist() == shared
        assert all(plan.starts[: plan.num_decodes] >= plan.shared_lens)

    def _write(self, plan: StepPlan) -> tuple[list[tuple[int, ...]], list[int]]:
        """Store the step's cells, then read each row's back; returns the rows' prefixes and the tokens' positions."""
        ends = np.cumsum(plan.num_new).tolist()
        inputs = []
        for slot, start, num_new, end in zip(
            plan.slots.tolist(), plan.starts.tolist(), plan.num_new, ends, strict=True
        ):
            ids = plan.token_ids[end - num_new : end].tolist()
            inputs.append((slot, start, [self.last[slot] if token == DEVICE_TOKEN else token for token in ids]))
        written = set()
        for slot, start, tokens in sorted(inputs, key=lambda part: part[1]):  # a row may stand on what another writes
            prefix = self.memory[self._cell(slot, start - 1)] if start else ()
            assert len(prefix) == start
            for token in tokens:
                cell = self._cell(slot, len(prefix))
                assert cell not in written
                written.add(cell)
                prefix = (*prefix, token)
                self.memory[cell] = prefix
        prefixes = []
        for slot, start, tokens in inputs:
            cells = [self._cell(slot, position) for position in range(start + len(tokens))]
            assert len(set(cells)) == len(cells)
            assert len(cells) < self.limits.get(self.seeds[slot], 10**9)
            whole = self.memory[cells[-1]]
            assert [self.memory[cell] for cell in cells] == [whole[: i + 1] for i in range(len(whole))]
            prefixes.append(whole)
        return prefixes, [start + i + 1 for _, start, tokens in inputs for i in range(len(tokens))]

    def _cell(self, slot: int, position: int) -> tuple[int, int]:
        return self.table[slot, position // self.block_size], position % self.block_size


def expected(row: EncodedRow, max_model_len: int) -> tuple[list[int], str]:
    """Tokens and finish_reason of a row that is left alone."""
    params, out = row.params, []
    stop = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})
    most = min(params.max_tokens or max_model_len, max_model_len - len(row.prompt_token_ids))
    while len(out) < most:
        banned = frozenset(stop | {EOS} if len(out) < params.min_tokens else ())
        token = answer((*row.prompt_token_ids, *out), banned)
        if token == NAN:
            return out, "error"
        out.append(token)
        if token in stop:
            return out, "stop"
    return out, "length"


@st.composite
def rows(draw) -> EncodedRow:
    """Few different tokens and common beginnings, so that prefixes meet."""
    prompt = [3] * draw(st.integers(0, 9)) + draw(st.lists(st.integers(3, 5), min_size=1, max_size=9))
    max_tokens = draw(st.one_of(st.none(), st.integers(1, 20)))
    params = SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, min(max_tokens or 9, 9))),
        ignore_eos=draw(st.booleans()),
        stop_token_ids=draw(st.sampled_from([(), (7,), (7, 8)])),
        prompt_logprobs=draw(st.sampled_from([None, None, None, 0])),
    )
    return EncodedRow(prompt, params)


@pytest.fixture(scope="module", autouse=True)
def _groups_of_any_size():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "MIN_SHARED_TOKENS", 1)
        patch.setattr(groups, "MIN_SAVING", 0.0)
        yield


@pytest.fixture(scope="module")
def engine(folder_of) -> Engine:
    """A real engine; the tests below give it another pool, scheduler and device."""
    config = EngineConfig.parse(
        model=folder_of("llama"), **TINY, skip_tokenizer_init=True, num_gpu_blocks_override=2, max_num_seqs=1
    )
    return Engine(config)


@pytest.fixture(scope="module", autouse=True)
def any_pace():
    """Steps here are far too small to be paced in earnest, and texts too short for long n-grams."""
    with (
        patch("rayinfer.speculation.NGRAM", 1),
        patch("rayinfer.scheduler.MIN_DRAFTS", 0.1),
    ):
        yield


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_every_row_gets_its_tokens(engine, data):
    block_size = data.draw(st.sampled_from([1, 2, 4, 8]), "block_size")
    max_model_len = data.draw(st.integers(19, 40), "max_model_len")
    least = -(-max_model_len // block_size) + 1
    num_blocks = data.draw(st.one_of(st.integers(least, least + 6), st.integers(least, 6 * least)), "num_blocks")
    max_num_seqs = data.draw(st.integers(1, 6), "max_num_seqs")
    budget = data.draw(st.one_of(st.integers(1, 9), st.integers(10, 60)), "budget")
    given_rows = data.draw(st.lists(rows(), min_size=1, max_size=10), "rows")
    gaps = data.draw(st.lists(st.integers(0, 4), min_size=len(given_rows), max_size=len(given_rows)), "gaps")

    engine.pool = BlockPool(num_blocks, block_size, data.draw(st.booleans(), "prefix caching"))
    max_draft_step = data.draw(st.integers(0, 40), "max_draft_step")
    engine.scheduler = Scheduler(engine.pool, max_num_seqs, budget, max_draft_step, min_pace=1)
    engine.scheduler.all_known = data.draw(st.booleans(), "all_known")
    engine.max_model_len = max_model_len
    run_ahead = data.draw(st.integers(0, 2), "run_ahead")
    device = Device(max_num_seqs, budget, num_blocks, block_size, run_ahead, max_draft_step)
    engine.runner = device
    before = engine.snapshot().num_accepted_tokens

    outputs, in_order, lens = {}, [], {}
    arrivals = np.cumsum(gaps).tolist()
    want = [expected(row, max_model_len) for row in given_rows]
    # Even one token a step, each row computed again for each token of every other, ends within this.
    limit = (
        100
        + 2 * sum(len(row.prompt_token_ids) + len(out) + 1 for row, (out, _) in zip(given_rows, want, strict=True)) ** 2
    )
    for step in range(limit):
        for index, row in enumerate(given_rows):
            if arrivals[index] == step:
                engine.add(str(index), row)
                request = engine._requests[str(index)]
                if request.leader is None:
                    in_order.append(request.seed)
                lens[request.seed] = request.max_total_tokens - len(row.prompt_token_ids)
                device.limits[request.seed] = request.max_total_tokens
        for output in engine.step():
            assert int(output.request_id) not in outputs
            outputs[int(output.request_id)] = output
        check_blocks(engine.pool, engine.scheduler.running)
        assert len(engine.scheduler.running) <= max_num_seqs
        if step >= arrivals[-1] and not engine.has_work:
            break
    assert sorted(outputs) == list(range(len(given_rows))), "a row starved"
    while engine._in_flight:
        engine.step()
    target(float(engine.stats.num_accepted_tokens - before), label="accepted drafts")
    assert engine.pool.num_free == num_blocks - 1
    assert sorted(engine.scheduler._free_slots) == list(range(max_num_seqs))
    began = [seed for seed in device.order if seed in in_order]
    for seed, later in itertools.combinations([seed for seed in in_order if seed in began], 2):
        if lens[seed] >= lens[later]:
            assert began.index(seed) < began.index(later), "rows of one length come in first come, first served"

    for index, (row, (tokens, reason)) in enumerate(zip(given_rows, want, strict=True)):
        completion = outputs[index].outputs[0]
        assert completion.token_ids == tokens
        assert completion.finish_reason == reason
        assert outputs[index].error_type == ("NAN_LOGITS" if reason == "error" else None)
        if row.params.prompt_logprobs is not None:
            values = [next(iter(entry.values())).logprob for entry in outputs[index].prompt_logprobs[1:]]
            assert values == list(range(1, len(row.prompt_token_ids)))


def test_decoding_rows_come_before_prompts(engine):
    """With a budget of 8 and three rows decoding, a long prompt gets 5 tokens a step."""
    engine.pool, engine.max_model_len = BlockPool(60, 4), 80
    engine.scheduler = Scheduler(engine.pool, 4, 8)
    engine.runner = Device(4, 8, 60, 4, 0)
    short = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    for index in range(3):
        engine.add(f"short {index}", EncodedRow([3, 4 + index], short))
    engine.step()
    engine.add("long", EncodedRow([5] * 40, short.model_copy(update={"max_tokens": 1})))
    plans = []
    for _ in range(4):
        step = engine.scheduler.schedule()
        plans.append((step.plan.num_decodes, step.plan.num_new.tolist()))
        engine._read(step, engine.runner.launch(step.plan))
    assert plans == [(3, [1, 1, 1, 5])] * 4
    engine.abort_all()


def test_youngest_row_is_preempted(engine):
    """When blocks run out, the row that came last goes back to the front of the queue, and comes back first."""
    engine.pool, engine.max_model_len = BlockPool(9, 2, False), 14
    engine.scheduler = Scheduler(engine.pool, 3, 30)
    engine.scheduler.all_known = False  # else rows would come at the pace of the blocks
    engine.runner = Device(3, 30, 9, 2, 0)
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    for name, token in (("old", 3), ("middle", 4), ("young", 5), ("waiting", 6)):
        engine.add(name, EncodedRow([token] * 4, params))
    while not engine.scheduler.num_preemptions:
        engine.step()
    assert [r.request_id for r in engine.scheduler.waiting] == ["young", "waiting"]
    assert engine.scheduler.waiting[0].blocks == []
    engine.abort_all()
    assert engine.pool.num_free == 8


def test_prompt_logprobs_bound_a_step(engine):
    """Logits of whole prompts: room for 512 tokens of a step, whosever they are; the rows of one step share it."""
    engine.pool, engine.max_model_len = BlockPool(2000, 16), 200
    engine.scheduler = Scheduler(engine.pool, 16, 2000)
    engine.runner = device = Device(16, 2000, 2000, 16, 0)
    launch, targets, decodes = device.launch, [], []

    def counted(plan):
        targets.append(len(plan.prompt_targets))
        decodes.append(plan.num_decodes)
        return launch(plan)

    device.launch = counted
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, prompt_logprobs=0)
    for index in range(12):
        engine.add(str(index), EncodedRow([3 + index] * 150, params))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert max(targets) <= PROMPT_LOGPROB_CHUNK
    assert targets[:3] == [PROMPT_LOGPROB_CHUNK - num_complete for num_complete in (3, 3, 4)]
    assert decodes[:4] == [0, 3, 6, 10]  # rows that are past their prompts do not wait for the room
    assert all(len(output.prompt_logprobs) == 150 for output in outputs)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("when", ["before the step", "after a part of it"])
@pytest.mark.parametrize("run_ahead", [0, 1])
def test_out_of_memory(make_llm, when, run_ahead):
    """Steps that find no memory: smaller steps from there on, the same tokens, no row lost."""
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=12, ignore_eos=True)
    prompts = as_rows(random_prompts(24))
    want = ids_of(make_llm("llama").generate(prompts, params, use_tqdm=False))
    llm = make_llm("llama", run_ahead=run_ahead, block_size=4, max_num_seqs=16, max_num_batched_tokens=64)
    launch, numbers, errors = llm.engine.runner.launch, iter(range(10**6)), iter(OUT_OF_MEMORY)

    def full(plan):
        if next(numbers) in (0, 5, 6, 20):
            if when != "before the step":
                launch(plan)
            raise next(errors)
        return launch(plan)

    llm.engine.runner.launch = full
    assert ids_of(llm.generate(prompts, params, use_tqdm=False)) == want
    scheduler = llm.engine.scheduler
    assert (scheduler.num_slots, scheduler.max_num_batched_tokens) == (1, 4)


def test_fewer_slots_are_filled_again(engine):
    """After steps without memory, the groups that rows are let in by shrink with the slots."""
    engine.pool, engine.max_model_len = BlockPool(2000, 4), 80
    engine.scheduler = scheduler = Scheduler(engine.pool, 64, 640)
    engine.runner = device = Device(64, 640, 2000, 4, 0)
    launch, sizes = device.launch, []
    device.launch = lambda plan: sizes.append(len(plan.slots)) or launch(plan)
    for _ in range(3):
        scheduler.shrink()
    assert scheduler.num_slots == 8
    params = SamplingParams(temperature=0, ignore_eos=True)
    for index in range(64):
        engine.add(str(index), EncodedRow([3, index], params.model_copy(update={"max_tokens": 1 + index % 8})))
    while engine.has_work:
        engine.step()
    assert sizes[:20] == [8] * 20


def test_out_of_memory_for_ever(make_llm):
    """Not a loop without an end: with nothing left to halve the error is raised."""
    llm = make_llm("llama", max_num_seqs=4, max_num_batched_tokens=64)

    def full(plan):
        raise torch.OutOfMemoryError("CUDA out of memory")

    llm.engine.runner.launch = full
    with pytest.raises(torch.OutOfMemoryError):
        llm.generate(as_rows([[5], [6]]), use_tqdm=False)
