"""When rows come in that are all known, the longest first: all are to end together, and the KV cache to hold them.

Let in as fast as they fit, rows would first be only prompts, then only decodes, of which few are left at the end. Where
there is little to do for as long as the longest row lasts, steps wait for the model's weights, which take as long for
some hundred tokens: prompts in small steps beside the decodes cost little then.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import numpy as np

from rayinfer.kv_cache import BlockPool
from rayinfer.request import Request

MIN_UNSURE = 256  # tokens of such a step if rows may end early: their prompts are not to come too late
SLACK = 32  # small steps may be one in so many more than the longest row has tokens: the longest rows have none
PACE_STEPS = 16  # steps until the pace is worked out again, and one more for each 1,000 rows to look at
LAUNCH = 3.5e11  # multiplications of a device while its host launches a layer: 1 ms, at 700 TFLOP/s


class Pace:
    """Says of a scheduler's waiting rows whether they may come into its next step, blocks and slots aside.

    Args:
        mixed: tokens of steps with prompts that are replayed as CUDA graphs, ascending, if their tokens read no more
            than so many KV tokens. Such steps are wanted when all rows could end together with them.
        min_pace: tokens of a step, below which an even pace of others is left alone: they are launched kernel by
            kernel, and a smaller one ends before the next is launched.
    """

    def __init__(
        self, pool: BlockPool, running: Sequence[Request], waiting: Sequence[Request],
        mixed: tuple[Sequence[int], int], min_pace: int,
    ):  # fmt: skip
        self._pool, self._running, self._waiting, self._min_pace = pool, running, waiting, min_pace
        self._mixed_sizes, self._max_reads = mixed
        self._tokens, self._steps_left = 0.0, 0  # of a step, for all rows to end together; until it is reckoned anew
        self._end = 0  # steps in which all rows are to end, once reckoned
        self._mixed = 0  # tokens of a small step with prompts; 0: prompts come in larger ones
        self._room, self._credit = float("inf"), 0.0  # prompt tokens that may come in, and that are carried over
        self._longest = 0  # tokens that the running rows may yield at most
        self._for_kv: float | None = None  # prompt tokens of a step, see `_reckon_for_kv`; 0: no row is held back
        self._shared = 0  # tokens that all rows have in common, and the cache once

    def reset(self) -> None:
        """Reckon anew: a row was added."""
        self._steps_left, self._end, self._for_kv = 0, 0, None

    def begin_step(self, max_num_batched_tokens: int) -> int:
        """Make room for prompt tokens in the next step; returns the tokens that it may have.

        Prompts come as they must for all rows to end together with the longest, if none else come. Rows that could end
        after the longest running one come in without room, unless the KV cache sets the pace.
        """
        if self._for_kv is None and self._waiting:
            self._for_kv = self._reckon_for_kv()
        if self._for_kv and self._running:
            self._room = self._credit = min(self._credit + self._for_kv, max_num_batched_tokens)
            return max_num_batched_tokens
        self._steps_left -= 1
        self._longest -= 1
        self._end -= 1
        if self._steps_left <= 0:
            self._steps_left = PACE_STEPS + len(self._waiting) // 1000
            self._longest = max(map(num_left, self._running), default=0)
            self._reckon()
        if self._mixed or self._tokens < self._min_pace or not self._running:
            self._room, self._credit = float("inf"), 0.0
        else:
            more = self._tokens - len(self._running)
            self._room = self._credit = min(self._credit + more, max_num_batched_tokens)
        if not self._mixed:
            return max_num_batched_tokens
        return min(max_num_batched_tokens, max(self._mixed, len(self._running)))

    def admits(self, request: Request) -> bool:
        """Whether the row may come in."""
        if self._room <= 0 and (self._for_kv or num_left(request) < self._longest):
            return False
        return not (self._for_kv and self._running) or self._lasts_with(request)

    def took(self, request: Request, num_new: int) -> None:
        """Take note of a row that came in, with so many tokens to compute before it yields one."""
        self._room -= num_new
        self._credit -= num_new
        self._longest = max(self._longest, num_left(request))

    def _reckon(self) -> None:
        """Tokens of each step with which all rows end together, and whether steps are to be small ones."""
        rows = [*self._running, *self._waiting]
        work = sum(row.max_total_tokens - row.num_scheduled for row in rows)
        longest = max([1, *map(num_left, rows)])
        self._tokens = work / longest
        self._end = max(self._end, longest)
        self._mixed = self._reckon_mixed(rows)

    def _reckon_mixed(self, rows: list[Request]) -> int:
        """Tokens of small steps with which all rows end with the longest, about; 0 if they are not small.

        A row that may yield L tokens has to come in L steps before the end. Until then the prompts up to its own are to
        be computed, and what the rows before it yield.
        """
        if not self._waiting or not self._mixed_sizes or self._tokens > self._mixed_sizes[-1]:
            return 0
        if any(row.params.prompt_logprobs is not None for row in rows):
            return 0
        prompts_W = np.array([row.num_tokens for row in self._waiting])
        left_W, left_R = (np.array([num_left(row) for row in some]) for some in (self._waiting, self._running))
        order_W = np.argsort(-left_W, kind="stable")
        left_W, left_R = left_W[order_W], np.sort(left_R)
        until_W = self._end - left_W
        num_ended_W = np.searchsorted(left_R, until_W)  # of the running rows
        decodes_W = np.append(0, left_R.cumsum())[num_ended_W] + (len(left_R) - num_ended_W) * until_W
        decodes_W = decodes_W + left_W.cumsum() - np.arange(1, len(left_W) + 1) * left_W
        least = ((prompts_W[order_W].cumsum() + decodes_W) / until_W.clip(-(-self._end // SLACK))).max()
        if not all(row.params.ignore_eos for row in rows):
            least = max(least, MIN_UNSURE)
        if least * (prompts_W**2).sum() / prompts_W.sum() > self._max_reads:
            return 0
        return next((size for size in self._mixed_sizes if size >= least), 0)

    def _reckon_for_kv(self) -> float:
        """Prompt tokens that may come in a step for the KV cache to hold rows to their ends; 0 if it will hold all.

        Rows of like length that come in as fast as they fit grow together, until many are preempted and computed anew.
        N rows of I tokens that yield L more each and come in evenly over W steps hold N (I + L - W / 2) tokens when the
        first ends; if W would be longer than L, as many run at a time as hold I + L / 2 on average. Only sure lengths
        count (`ignore_eos`).
        """
        rows = [*self._running, *self._waiting]
        prompts, block, num, shared = [row.prompt_token_ids for row in rows], self._pool.block_size, len(rows), 0
        if self._pool.enable_prefix_caching:
            both = zip(min(prompts), max(prompts), strict=False)
            shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both)) // block * block
            if len({tuple(prompt[shared : shared + block]) for prompt in prompts}) < 0.9 * num:
                return 0.0  # some share more than all do: what they need is not known
        self._shared = shared
        now = sum(row.num_tokens for row in rows) / num - shared
        left = sum(map(_num_sure, rows)) / num
        capacity = 0.97 * (self._pool.num_blocks * block - shared)
        if left == 0 or num * (now + left) <= capacity:
            return 0.0
        evenly = num * (now + left / 2) <= capacity
        window = 2 * (now + left - capacity / num) if evenly else num * left * (now + left / 2) / capacity
        return num * now / max(1.0, window)

    def _lasts_with(self, request: Request) -> bool:
        """Whether the KV cache holds the running rows and this one to their ends, as far as these are sure."""
        rows = (*self._running, request)
        lens = sorted(((_num_sure(row), row.num_tokens - self._shared) for row in rows), reverse=True)
        left_R, now_R = np.array(lens).T
        at_end_R = now_R.cumsum() + left_R * np.arange(1, len(lens) + 1)  # of those that run as long as row R
        return int(at_end_R.max()) + self._shared <= self._pool.num_blocks * self._pool.block_size


def num_left(row: Request) -> int:
    """Tokens that a row may still yield, one a step."""
    return row.max_total_tokens - row.num_tokens


def _num_sure(row: Request) -> int:
    """Of those, tokens that it yields whatever they are."""
    return num_left(row) if row.params.ignore_eos else 0
