"""What one step computes, as plain arrays: all that a runner, here or on another rank, needs to carry it out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

DEVICE_TOKEN = -1  # this step's input is the slot's last sampled token, which only the device knows


@dataclass(slots=True)
class StepPlan:
    """One step as plain arrays: what a runner, here or on another rank, needs to carry it out.

    Rows are ordered decodes (one token, from the device or the host) first, then prompt chunks.

    Attributes:
        slots, starts, num_new: int32 [R], the row's slot, tokens already in its KV, tokens of this step.
        num_decodes: rows of one token at the front.
        token_ids: int32 [T], input tokens; DEVICE_TOKEN where the slot's last sample is meant.
        samples: int32 [L], rows that yield tokens, ascending.
        new_blocks: int32 [U, 3], (slot, index, block) entries to write into the block table first.
        new_rows: (slot, temperature, top_k, top_p, min_p, seed) of rows that got a slot.
        all_greedy: every sampling row has temperature 0.
        banned: int32 [*, 2], (position in `samples`, token) that may not be sampled.
        shared_lens: int32 [num_decodes], tokens that a decode row shares with its prefix group; 0 for rows alone.
        group_starts, group_lens: int32 [G + 1] and [G], the rows and shared tokens of each group as in `StepMeta`; all
            groups are decode rows, and come first.
        num_logprobs: most top-n log-probabilities that a sampling row asks for; -1 when none asks at all.
        prompt_targets: int32 [M, 2], (token of the step, the token that follows it) whose log-probability is wanted.
        num_prompt_logprobs: top-n wanted for those; -1 when none.
    """

    slots: np.ndarray
    starts: np.ndarray
    num_new: np.ndarray
    num_decodes: int
    token_ids: np.ndarray
    samples: np.ndarray
    new_blocks: np.ndarray
    new_rows: list[tuple[int, float, int, float, float, int]]
    all_greedy: bool
    banned: np.ndarray
    shared_lens: np.ndarray
    group_starts: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int32))
    group_lens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    num_logprobs: int = -1
    prompt_targets: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int32))
    num_prompt_logprobs: int = -1

    @property
    def needs_logits(self) -> bool:
        """Whether more is done with the sampling rows' logits than to sample from them."""
        return self.num_logprobs >= 0 or len(self.banned) > 0

    def with_drafts(self, drafts: list[list[int]]) -> tuple[StepPlan, list[int]]:
        """A plan of decodes with each row's drafts behind it; and the row that each row of it was before."""
        num_R = np.array([1 + len(draft) for draft in drafts])
        end_R = num_R.cumsum()
        first_R = end_R - num_R
        of_R = np.repeat(np.arange(len(drafts)), num_R)
        count_R = np.arange(len(of_R), dtype=np.int32)
        ids = [i for token, draft in zip(self.token_ids.tolist(), drafts, strict=True) for i in (token, *draft)]
        plan = replace(
            self, slots=self.slots[of_R], starts=self.starts[of_R] + count_R - first_R[of_R].astype(np.int32),
            num_new=np.ones_like(count_R), num_decodes=len(of_R), token_ids=np.array(ids, np.int32), samples=count_R,
            banned=np.stack([first_R[self.banned[:, 0]].astype(np.int32), self.banned[:, 1]], 1),
            shared_lens=self.shared_lens[of_R],
            group_starts=np.append(0, end_R)[self.group_starts].astype(np.int32),
        )  # fmt: skip
        return plan, of_R.tolist()
