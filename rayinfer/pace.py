"""When rows come in that are all known, the longest first: all are to end together, and the KV cache to hold them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import numpy as np

from rayinfer.kv_cache import BlockPool
from rayinfer.request import Request

PACE_STEPS = 16  # steps until the pace is worked out again, and one more for each 1,000 rows to look at
LAUNCH = 3.5e11  # multiplications of a device while its host launches a layer: 1 ms, at 700 TFLOP/s


class Pace:
    """Says of a scheduler's waiting rows whether they may come into its next step, blocks and slots aside.

    `min_pace`: tokens of a step, below which an even pace is left alone: steps with prompts are launched kernel by
    kernel, and a smaller one ends before the next is launched.
    """

    def __init__(self, pool: BlockPool, running: Sequence[Request], waiting: Sequence[Request], min_pace: int):
        self._pool, self._running, self._waiting, self._min_pace = pool, running, waiting, min_pace
        self._tokens, self._steps_left = 0.0, 0  # of a step, for all rows to end together; until it is reckoned anew
        self._room, self._credit = float("inf"), 0.0  # prompt tokens that may come in, and that are carried over
        self._longest = 0  # tokens that the running rows may yield at most
        self._for_kv: float | None = None  # prompt tokens of a step, see `_reckon_for_kv`; 0: no row is held back
        self._shared = 0  # tokens that all rows have in common, and the cache once

    def reset(self) -> None:
        """Reckon anew: a row was added."""
        self._steps_left, self._for_kv = 0, None

    def begin_step(self, num_scheduled: int, max_num_batched_tokens: int) -> None:
        """Make room for prompt tokens in a step that has `num_scheduled` tokens.

        Let in as fast as they fit, rows would first be only prompts, then only decodes, of which few are left at the
        end. So prompts come as they must for all rows to end together with the longest, if none else come. Rows that
        could end after the longest running one come in without room, unless the KV cache sets the pace.
        """
        if self._for_kv is None and self._waiting:
            self._for_kv = self._reckon_for_kv()
        if self._for_kv and self._running:
            self._room = self._credit = min(self._credit + self._for_kv, max_num_batched_tokens)
            return
        self._steps_left -= 1
        self._longest -= 1
        if self._steps_left <= 0:
            self._steps_left = PACE_STEPS + len(self._waiting) // 1000
            self._longest = max(map(num_left, self._running), default=0)
            rows = [*self._running, *self._waiting]
            work = sum(row.max_total_tokens - row.num_scheduled for row in rows)
            self._tokens = work / max([1, *map(num_left, rows)])
        if self._tokens < self._min_pace or not self._running:
            self._room, self._credit = float("inf"), 0.0
        else:
            self._room = self._credit = min(self._credit + self._tokens - num_scheduled, max_num_batched_tokens)

    def admits(self, request: Request) -> bool:
        """Whether the row may come in."""
        if self._room <= 0 and (self._for_kv or num_left(request) < self._longest):
            return False
        return not (self._for_kv and self._running) or self._lasts_with(request)

    def took(self, request: Request, num_new: int) -> None:
        """Take note of a row that came in, with so many prompt tokens."""
        self._room -= num_new
        self._credit -= num_new
        self._longest = max(self._longest, num_left(request))

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
