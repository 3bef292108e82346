"""N-gram speculation: steps of few rows compute tokens that were guessed from a row's own text, too.

A decode step of few rows waits for the model's weights, whether it computes one token a row or several. So a row is
given drafts: what followed its last N tokens where they stood before (prompt lookup decoding, A. Saxena, 2023). A draft
is a decode row of its own, at the next position of the same slot, and needs nothing of a runner. What is sampled at a
draft is the row's next token if all drafts up to there are what was sampled before them. The noise of a token depends
on (seed, position) alone, so drawn rows get the tokens that they would have got, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from rayinfer.request import Request
    from rayinfer.scheduler import StepPlan

NGRAM = 3
MAX_DRAFTS = 15  # of a row and step
MIN_DRAFTS = 0.5  # a row, on average: a step with drafts is not launched before the one before it was read


class Lookup:
    """Where each N-gram of a row was followed by a token last, and how often in a row that told the next one."""

    def __init__(self) -> None:
        self.streak = 0
        self._tokens: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}

    def drafts(self, request: Request, most: int) -> list[int]:
        """Up to `most` tokens that may come next: no more than have been told right, one by one, until now."""
        tokens, places, old = self._tokens, self._places, len(self._tokens)
        tokens.extend(request.tokens(old, request.num_known_tokens))
        for end in range(max(old, NGRAM), len(tokens)):
            ngram = tuple(tokens[end - NGRAM : end])
            place = places.get(ngram)
            self.streak = self.streak + 1 if place is not None and tokens[place] == tokens[end] else 0
            places[ngram] = end
        place = places.get(tuple(tokens[-NGRAM:]))
        if place is None:
            return []
        period = len(tokens) - place  # a text that repeats itself goes on repeating
        return [tokens[place + i % period] for i in range(min(most, self.streak))]


def drafts_for(rows: Sequence[Request], max_tokens: int) -> list[list[int]]:
    """Drafts for each row, for a step of at most `max_tokens` tokens; an empty list if they would gain too little."""
    each = min(MAX_DRAFTS, max_tokens // max(1, len(rows)) - 1)
    found = []
    for row in rows:
        row.lookup = row.lookup or Lookup()
        some_banned = len(row.output_token_ids) < row.params.min_tokens  # at a draft, none would be
        found.append(row.lookup.drafts(row, 0 if some_banned else min(each, row.max_total_tokens - row.num_tokens - 1)))
    return found if sum(map(len, found)) >= MIN_DRAFTS * len(rows) else []


def with_drafts(plan: StepPlan, drafts: list[list[int]]) -> tuple[StepPlan, list[int]]:
    """A plan of decodes with each row's drafts behind it; and the row that each row of it was before."""
    num_R = np.array([1 + len(draft) for draft in drafts])
    end_R = num_R.cumsum()
    first_R = end_R - num_R
    of_R = np.repeat(np.arange(len(drafts)), num_R)
    count_R = np.arange(len(of_R), dtype=np.int32)
    ids = [i for token, draft in zip(plan.token_ids.tolist(), drafts, strict=True) for i in (token, *draft)]
    plan = replace(
        plan, slots=plan.slots[of_R], starts=plan.starts[of_R] + count_R - first_R[of_R].astype(np.int32),
        num_new=np.ones_like(count_R), num_decodes=len(of_R), token_ids=np.array(ids, np.int32), samples=count_R,
        banned=np.stack([first_R[plan.banned[:, 0]].astype(np.int32), plan.banned[:, 1]], 1),
        shared_lens=plan.shared_lens[of_R],
        group_starts=np.append(0, end_R)[plan.group_starts].astype(np.int32),
    )  # fmt: skip
    return plan, of_R.tolist()
