"""Which tokens of which rows the next step computes.

One token budget a step: rows that decode first, then prompt chunks in progress, then new rows. Nothing here waits for
the device: tokens that launched steps will yield are counted (`Request.num_pending`) before they are known.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayinfer import groups
from rayinfer.kv_cache import BlockPool
from rayinfer.pace import Pace, num_left
from rayinfer.plan import DEVICE_TOKEN, StepPlan
from rayinfer.request import Request
from rayinfer.speculation import Lookup

PROMPT_LOGPROB_CHUNK = 512  # tokens of a step that need logits because prompt log-probabilities are asked for
MAX_DRAFTS = 15  # of a row and step
MIN_DRAFTS = 0.5  # a row, on average: a step with drafts is not launched before the one before it was read
MIN_BATCHED_TOKENS = 16  # a step that does not fit into memory is made smaller down to this


@dataclass(slots=True)
class Step:
    """A plan together with the host's rows it is for: `rows[i]` is the plan's row i.

    Of the `num_drafts` rows that are drafts, each is behind the one it goes on from, and has the same host's row.
    """

    plan: StepPlan
    rows: list[Request]
    num_drafts: int = 0


class Scheduler:
    """Admission, chunking and preemption over one block pool.

    Args:
        max_num_seqs: rows that hold a slot at once.
        max_num_batched_tokens: tokens of one step, decodes and prompt chunks together.
        max_draft_step: tokens of a step that are about as fast as one; up to there, rows get drafts (speculation.py).
        mixed, min_pace: for rows that are all known, see `Pace`.
    """

    def __init__(
        self, pool: BlockPool, max_num_seqs: int, max_num_batched_tokens: int, max_draft_step: int = 0,
        mixed: tuple[Sequence[int], int] = ((), 0), min_pace: int = 2048,
    ):  # fmt: skip
        self.pool = pool
        self.max_num_batched_tokens, self.max_draft_step = max_num_batched_tokens, max_draft_step
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = self._num_steps = 0
        self.all_known: bool | None = None  # the rows that wait are all that there are; None: if it seems so
        self._num_added = self._num_finished = 0  # rows since there were none; rows since one was added
        self._pace = Pace(pool, self.running, self.waiting, mixed, min_pace)
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._new_blocks: list[tuple[int, int, int]] = []
        self.admitted: list[Request] = []  # rows that got a slot in the newest step
        # Blocks kept back when new rows come in, so that running rows seldom have to be preempted for lack of one.
        self._reserve = max(1, pool.num_blocks // 100)
        self._full = False
        self._groups = groups.PrefixGroups(pool.block_size)

    @property
    def num_slots(self) -> int:
        return len(self.running) + len(self._free_slots)

    def _none_to_come(self) -> bool:
        """Whether the rows here are all, or seem to be.

        A job that has more sends twice as many as there are slots, then an eighth of that each time that as many have
        ended (`processor.rows_in_flight`).
        """
        if self.all_known is not None:
            return self.all_known
        return self._num_added <= 2 * self.num_slots or 8 * self._num_finished >= 3 * self.num_slots

    def add(self, request: Request) -> None:
        """Queue a row. One that may yield N more tokens than another goes before it if it comes at most N steps later.

        So long rows are not left alone at the end, and no row waits for ever; rows of one length come in as they came.
        """
        self._num_added = self._num_added + 1 if self.waiting or self.running else 1
        self._num_finished = 0
        request.rank = self._num_steps - num_left(request)
        place = len(self.waiting)  # of nearly all rows; a search in a long deque is slow
        if place and self.waiting[-1].rank > request.rank:
            place = bisect_right(self.waiting, request.rank, key=lambda row: row.rank)
        self.waiting.insert(place, request)
        self._pace.reset()

    def finish(self, request: Request, forget: bool = False) -> None:
        """Take a finished row out and free what it holds; `forget` its KV if it is not to be trusted."""
        self._num_finished += 1
        if request.slot >= 0:
            self.running.remove(request)
            self._release(request, forget)
        else:
            self.waiting.remove(request)

    def shrink(self) -> bool:
        """Queue all rows again and halve the budget and the slots; False when there is nothing left to halve."""
        for request in reversed(list(self.running)):
            self._preempt(request)
        if self.num_slots == 1 and self.max_num_batched_tokens <= MIN_BATCHED_TOKENS:
            return False
        self.max_num_batched_tokens = max(1, self.max_num_batched_tokens // 2)
        del self._free_slots[: self.num_slots // 2]
        return True

    def schedule(self) -> Step | None:
        """The next step, or None when no row can go on before an earlier step has been read."""
        self._num_steps += 1
        self._new_blocks, self.admitted = [], []
        budget, num_preemptions = self.max_num_batched_tokens, self.num_preemptions
        if all_known := self._none_to_come():
            budget = self._pace.begin_step(budget)
        self._targets_left = PROMPT_LOGPROB_CHUNK
        decodes: list[Request] = []
        chunks: list[tuple[Request, int]] = []
        for request in list(self.running):
            if request.slot < 0:
                continue  # preempted for a row before it
            start = request.num_scheduled
            remaining = len(request.prompt_token_ids) + len(request.output_token_ids) + request.num_pending - start
            if start + remaining >= request.max_total_tokens:
                continue  # its last token is on the way
            num_new = min(remaining, budget)
            if num_new == 1 and start < len(request.blocks) * self.pool.block_size:  # what most rows are, most times
                budget -= 1
                decodes.append(request)
                continue
            num_new = self._limited(request, num_new)
            if num_new <= 0 or not self._make_room(request, num_new):
                continue
            budget -= num_new
            (decodes.append(request) if num_new == 1 else chunks.append((request, num_new)))
        if self.num_preemptions == num_preemptions:  # else a row just put back would take the blocks again
            self._admit(budget, all_known, decodes, chunks)
        if self.pool.enable_prefix_caching and decodes:
            self._groups.order(decodes, self.running)
        rows = decodes + [request for request, _ in chunks]
        if not rows:
            return None
        drafts = self.drafts(decodes) if not chunks and not any(row.num_pending for row in decodes) else []
        for row, draft in zip(decodes, drafts, strict=False):
            if not self._grow(row, 1 + len(draft)):
                draft.clear()
        plan = self._plan(rows, [1] * len(decodes) + [n for _, n in chunks], len(decodes))
        if not drafts:
            return Step(plan, rows)
        plan, index_R = plan.with_drafts(drafts)
        return Step(plan, [rows[i] for i in index_R], len(index_R) - len(rows))

    def drafts(self, rows: list[Request]) -> list[list[int]]:
        """Drafts for each of the rows, as far as these are known; an empty list if the next step is to have none."""
        most = min(self.max_draft_step, self.num_slots, self.max_num_batched_tokens)
        if self.waiting or 2 * len(rows) > most or any(row.num_tokens - row.num_scheduled != 1 for row in rows):
            return []  # prompts come, or are not done, or there are too many rows
        each, found = min(MAX_DRAFTS, most // max(1, len(rows)) - 1), []
        for row in rows:
            row.lookup = row.lookup or Lookup()
            row.lookup.learn(row.tokens(len(row.lookup.tokens), row.num_known_tokens))
            some_banned = len(row.output_token_ids) < row.params.min_tokens  # at a draft, none would be
            found.append(row.lookup.guess(0 if some_banned else min(each, num_left(row) - 1)))
        return found if sum(map(len, found)) >= MIN_DRAFTS * len(rows) else []

    def _limited(self, request: Request, num_new: int) -> int:
        """Of `num_new` tokens, those for whose logits this step has room; the room is taken."""
        if request.params.prompt_logprobs is None or request.num_scheduled >= request.num_prompt_tokens - 1:
            return num_new
        num_new = min(num_new, self._targets_left)
        self._targets_left -= num_new
        return num_new

    def _make_room(self, request: Request, num_new: int) -> bool:
        """Give the row blocks for `num_new` more tokens, preempting the youngest rows if none are free.

        Rows are served from the oldest on, so a row that gives way was not yet given anything in this step.
        """
        while not self._grow(request, num_new):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _grow(self, request: Request, num_new: int) -> bool:
        have = len(request.blocks)
        need = -(-(request.num_scheduled + num_new) // self.pool.block_size) - have
        if need > self.pool.num_free:
            return False
        if need > 0:
            blocks = self.pool.allocate(need)
            self._new_blocks.extend((request.slot, have + i, block) for i, block in enumerate(blocks))
            request.blocks.extend(blocks)
        return True

    def _preempt(self, request: Request) -> None:
        """Take the blocks of a row and queue it again; its KV is computed anew (or found in the prefix cache)."""
        self.running.remove(request)
        self._release(request)
        self.num_preemptions += 1
        request.rank = -sys.maxsize
        self.waiting.appendleft(request)

    def _release(self, request: Request, forget: bool = False) -> None:
        self.pool.release(request, forget)
        self._free_slots.append(request.slot)
        request.slot, request.num_scheduled, request.group = -1, 0, -1

    def _admit(
        self, budget: int, paced: bool, decodes: list[Request], chunks: list[tuple[Request, int]]
    ) -> None:  # fmt: skip
        """Let waiting rows in while slots, blocks and budget last, and their pace allows."""
        # Once full, rows are let in again in groups: steps without prompt chunks are cheaper (one CUDA graph each).
        few_slots = len(self._free_slots) < min(max(1, self.num_slots // 16), len(self.waiting))
        if self._full and self.running and (few_slots or self.pool.num_free < self.pool.num_blocks // 16):
            return
        self._full = False
        while self.waiting and budget > 0:
            request = self.waiting[0]
            if not self._free_slots:
                self._full = True
                break
            if request.num_pending:
                break  # preempted with a token still on the device: it must be read first
            if paced and not self._pace.admits(request):
                break
            # The last token is always computed: its logits are what is wanted.
            reuse = request.params.prompt_logprobs is None or bool(request.output_token_ids)
            known = self.pool.match(request, request.num_tokens - 1) if reuse else []
            num_known = len(known) * self.pool.block_size
            num_new = self._limited(request, min(request.num_tokens - num_known, budget))
            if num_new <= 0:
                break
            need = -(-(num_known + num_new) // self.pool.block_size) - len(known)
            need += sum(self.pool.ref_count[block] == 0 for block in known)  # nobody uses these: they are free, too
            if need + self._reserve * bool(self.running) > self.pool.num_free:
                self._full = True
                break
            self.waiting.popleft()
            request.slot = self._free_slots.pop()
            self.pool.share(request, known)
            self._new_blocks.extend((request.slot, i, block) for i, block in enumerate(known))
            self.admitted.append(request)
            request.num_scheduled = num_known
            if request.num_cached_tokens < 0:
                request.num_cached_tokens = num_known
            self.running.append(request)
            self._groups.join(request)
            grown = self._grow(request, num_new)
            assert grown
            budget -= num_new
            self._pace.took(request, request.num_tokens - num_known)
            # Registered at once, so that the next row of this very step can share the blocks.
            self.pool.register(request, num_known + num_new)
            (decodes.append(request) if num_new == 1 else chunks.append((request, num_new)))

    def _plan(self, rows: list[Request], num_new: list[int], num_decodes: int) -> StepPlan:
        """Write the step down as arrays and advance the rows' counts."""
        starts = [request.num_scheduled for request in rows]
        token_ids, samples = list[int](), list[int]()
        banned, targets = list[tuple[int, int]](), list[tuple[int, int]]()
        all_greedy, num_logprobs, num_prompt_logprobs = True, -1, -1
        block_size = self.pool.block_size
        for index, (request, start, num) in enumerate(zip(rows, starts, num_new, strict=True)):
            params = request.params
            end = request.num_scheduled = start + num
            num_known = len(request.prompt_token_ids) + len(request.output_token_ids)
            if start >= num_known:
                token_ids.append(DEVICE_TOKEN)
            else:
                if params.prompt_logprobs is not None and start < request.num_prompt_tokens - 1:
                    first = len(token_ids)
                    following = request.prompt_token_ids[start + 1 : end + 1]
                    targets.extend((first + i, token) for i, token in enumerate(following))
                    num_prompt_logprobs = max(num_prompt_logprobs, params.prompt_logprobs)
                token_ids.extend(request.tokens(start, end))
            if end >= (request.num_registered_blocks + 1) * block_size:
                self.pool.register(request, min(end, num_known))
            if end < num_known + request.num_pending:
                continue  # a chunk that leaves prompt tokens for later yields none
            if params.min_tokens and params.min_tokens > len(request.output_token_ids) + request.num_pending:
                banned.extend((len(samples), token) for token in request.stop_token_ids)
            samples.append(index)
            request.num_pending += 1
            all_greedy = all_greedy and params.temperature == 0
            if params.logprobs is not None:
                num_logprobs = max(num_logprobs, params.logprobs)
        as_int = np.int32
        group_B = np.array([request.group for request in rows[:num_decodes]], as_int)
        lens_G = self._groups.lens_G if num_decodes and group_B[0] >= 0 else self._groups.lens_G[:0]
        admitted = [(request, request.params) for request in self.admitted]
        return StepPlan(
            slots=np.array([request.slot for request in rows], as_int), starts=np.array(starts, as_int),
            num_new=np.array(num_new, as_int), num_decodes=num_decodes, token_ids=np.array(token_ids, as_int),
            samples=np.array(samples, as_int), new_blocks=np.array(self._new_blocks, as_int).reshape(-1, 3),
            new_rows=[(r.slot, p.temperature, p.top_k, p.top_p, p.min_p, r.seed) for r, p in admitted],
            all_greedy=all_greedy, banned=np.array(banned, as_int).reshape(-1, 2),
            shared_lens=np.append(self._groups.lens_G, as_int(0))[group_B],
            group_starts=np.searchsorted(group_B[group_B >= 0], np.arange(len(lens_G) + 1)).astype(as_int),
            group_lens=lens_G, num_logprobs=num_logprobs,
            prompt_targets=np.array(targets, as_int).reshape(-1, 2), num_prompt_logprobs=num_prompt_logprobs,
        )  # fmt: skip
