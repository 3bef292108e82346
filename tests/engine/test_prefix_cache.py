"""The block pool against a model in plain Python, and prefix hits through the engine."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rayinfer import SamplingParams
from rayinfer.kv_cache import BlockPool
from rayinfer.request import Request
from tests.engine.tiny import as_rows, check_blocks, ids_of, random_prompts

NUM_BLOCKS, SIZE = 9, 2


class PoolMachine(RuleBasedStateMachine):
    """Rows come, grow, end and are preempted; the model writes each token's whole prefix where its KV would be.

    `memory[block][offset]` is what a device would hold: the tokens up to and with this one. A hit on a block whose
    memory is not the row's own prefix would be a wrong answer, whatever made it.
    """

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, SIZE)
        self.memory = [[None] * SIZE for _ in range(NUM_BLOCKS)]
        self.rows: list[Request] = []
        self.written: dict[int, int] = {}  # tokens of a row whose KV is in memory, by id()
        self.num_made = 0

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def add(self, tokens):
        row = Request(str(self.num_made), tokens, SamplingParams())
        found = self.pool.match(row, len(tokens) - 1)
        assert len(found) <= (len(tokens) - 1) // SIZE
        need = -(-len(tokens) // SIZE)
        if need - len(found) + sum(self.pool.ref_count[block] == 0 for block in found) > self.pool.num_free:
            return
        self.num_made += 1
        for index, block in enumerate(found):
            for offset in range(SIZE):
                assert self.memory[block][offset] == tuple(tokens[: index * SIZE + offset + 1])
        free = self.pool.num_free
        self.pool.share(row, found)
        row.blocks.extend(self.pool.allocate(need - len(found)))
        assert free - self.pool.num_free <= need
        self.rows.append(row)
        self.written[id(row)] = len(found) * SIZE
        self._write(row, len(tokens))

    def _write(self, row: Request, num_tokens: int) -> None:
        self.pool.register(row, num_tokens)
        for position in range(self.written[id(row)], num_tokens):
            block, offset = row.blocks[position // SIZE], position % SIZE
            assert self.pool.ref_count[block] == 1 or position // SIZE < row.num_registered_blocks
            self.memory[block][offset] = tuple(row.tokens(0, position + 1))
        self.written[id(row)] = num_tokens

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), token=st.integers(0, 1))
    def decode(self, data, token):
        row = data.draw(st.sampled_from(self.rows))
        row.output_token_ids.append(token)
        if -(-row.num_known_tokens // SIZE) > len(row.blocks):
            if not self.pool.num_free:
                row.output_token_ids.pop()
                return
            row.blocks.extend(self.pool.allocate(1))
        self._write(row, row.num_known_tokens)

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), forget=st.booleans())
    def release(self, data, forget):
        row = data.draw(st.sampled_from(self.rows))
        self.rows.remove(row)
        blocks = list(row.blocks)
        self.pool.release(row, forget)
        assert not row.blocks
        if forget:  # nobody can find them any more
            known = {block for block, _ in self.pool._known.values()}
            assert not known & set(blocks)

    @rule()
    def reset(self):
        self.pool.reset_prefix_cache()
        probe = Request("probe", [0] * 9, SamplingParams())
        assert self.pool.match(probe, 9) == []

    @invariant()
    def blocks_add_up(self):
        check_blocks(self.pool, self.rows)
        assert self.pool.ref_count[0] == 0
        assert all(0 not in row.blocks for row in self.rows)
        used = {block for row in self.rows for block in row.blocks}
        assert self.pool.num_free == NUM_BLOCKS - 1 - len(used)
        assert abs(self.pool.usage - len(used) / (NUM_BLOCKS - 1)) < 1e-9

    @invariant()
    def memory_is_the_rows_own(self):
        """No row ever sees another prefix than its own, whoever wrote the block."""
        for row in self.rows:
            for position in range(self.written[id(row)]):
                held = self.memory[row.blocks[position // SIZE]][position % SIZE]
                assert held == tuple(row.tokens(0, position + 1))


PoolMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestPool = PoolMachine.TestCase


def _row(tokens: list[int]) -> Request:
    return Request("row", tokens, SamplingParams())


def _fill(pool: BlockPool, tokens: list[int]) -> Request:
    row = _row(tokens)
    row.blocks.extend(pool.allocate(len(tokens) // pool.block_size))
    pool.register(row, len(tokens))
    return row


def test_child_of_an_evicted_parent_is_not_found():
    """Equal second blocks under different first ones; the first parent is evicted, then another takes its place."""
    pool = BlockPool(4, 2)
    first = _fill(pool, [1, 1, 5, 5])
    child = first.blocks[1]
    pool.release(first)
    pool.allocate(1)  # never used: the third block
    taken = pool.match(_row([1, 1, 5, 5, 0]), 4)
    assert taken[1] == child
    holder = _row([1, 1, 5, 5])
    pool.share(holder, taken)
    assert pool.match(_row([2, 2, 5, 5, 0]), 4) == []
    pool.release(holder)
    evicting = _fill(pool, [2, 2])  # takes the deepest block: the child
    assert evicting.blocks == [child]
    assert pool.match(_row([2, 2, 5, 5, 0]), 4) == [child]
    assert len(pool.match(_row([1, 1, 5, 5, 0]), 4)) == 1


def test_equal_hashes_are_told_apart():
    """hash(-1) == hash(-2) in CPython: keys whose hashes collide still compare by content."""
    assert hash((0, (-1, 7))) == hash((0, (-2, 7)))
    pool = BlockPool(4, 2)
    _fill(pool, [-1, 7])
    assert pool.match(_row([-2, 7, 0]), 2) == []
    assert len(pool.match(_row([-1, 7, 0]), 2)) == 1


def test_least_recently_freed_goes_first():
    pool = BlockPool(4, 2)
    rows = [_fill(pool, [i, i]) for i in (1, 2, 3)]
    for row in (rows[1], rows[0], rows[2]):
        pool.release(row)
    pool.allocate(1)
    assert [len(pool.match(_row([i, i, 0]), 2)) for i in (1, 2, 3)] == [1, 0, 1]


def test_integrity_check_sees_lost_and_doubled_blocks():
    pool = BlockPool(6, 2)
    row = _fill(pool, [1, 2, 3, 4])
    check_blocks(pool, [row])
    for wrong in ([], [row, row]):
        with pytest.raises(RuntimeError, match="3 free of 5"):
            check_blocks(pool, wrong)


def test_hits_are_counted_and_change_no_token(make_llm):
    """Rows of one step share the prefix that the first of them writes; later calls find all of it."""
    shared = random_prompts(1, 40, 41)[0]
    prompts = [shared[:32] + [i, i + 1, i + 2] for i in range(10, 16)]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    off = make_llm("llama", block_size=8, enable_prefix_caching=False)
    want = off.generate(as_rows(prompts), params, use_tqdm=False)
    llm = make_llm("llama", block_size=8)
    first = llm.generate(as_rows(prompts), params, use_tqdm=False)
    again = llm.generate(as_rows(prompts), params, use_tqdm=False)
    assert ids_of(first) == ids_of(again) == ids_of(want)
    assert [o.num_cached_tokens for o in want] == [0] * 6
    assert [o.num_cached_tokens for o in first] == [0] + [32] * 5
    assert [o.num_cached_tokens for o in again] == [32] * 6
    assert llm.engine.snapshot().num_cached_tokens == 32 * 11
    llm.reset_prefix_cache()
    assert [o.num_cached_tokens for o in llm.generate(as_rows(prompts[:1]), params, use_tqdm=False)] == [0]


def test_rows_of_one_step_hold_one_copy(make_llm):
    """Six prompts of 32 shared tokens need 4 + 6 blocks, not 6 * 5."""
    shared = random_prompts(1, 40, 41)[0]
    engine = make_llm("llama", block_size=8).engine
    for i in range(6):
        row = {"prompt_token_ids": shared[:32] + [10 + i], "sampling_params": {"max_tokens": 2, "temperature": 0}}
        engine.add(str(i), engine.inputs.encode_batch([row])[0])
    engine.step()
    assert engine.pool.num_blocks - 1 - engine.pool.num_free == 4 + 6
    check_blocks(engine.pool, engine.scheduler.running)
    while engine.has_work:
        engine.step()


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_generated_tokens_are_reused(make_llm, run_ahead):
    """A conversation's next turn finds the answer of the last one in the cache."""
    llm = make_llm("llama", run_ahead, block_size=4)
    prompt = random_prompts(1, 20, 21)[0]
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    answer = ids_of(llm.generate(as_rows([prompt]), params, use_tqdm=False))[0]
    output = llm.generate(as_rows([prompt + answer + [7, 8]]), params, use_tqdm=False)[0]
    # The KV of an answer's last token is never needed; a step ahead, the token before it was known too late as well.
    assert output.num_cached_tokens == (20 + 9 - 1 - run_ahead) // 4 * 4


def test_eviction_under_pressure_changes_no_token(make_llm, reference_of):
    """Many prompts through a pool that holds two of them: hits, evictions and new content under the same blocks."""
    prompts = random_prompts(12, 20, 40, seed=3)
    prompts = [prompts[i] for i in (0, 1, 2, 0, 3, 4, 0, 5, 1, 6, 0, 7, 2)]
    want = [reference_of("llama").generate(prompt, 4, eos_token_id=-1) for prompt in prompts]
    llm = make_llm("llama", block_size=4, num_gpu_blocks_override=26, max_model_len=100, max_num_seqs=2)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    for _ in range(2):
        assert ids_of(llm.generate(as_rows(prompts), params, use_tqdm=False)) == want
