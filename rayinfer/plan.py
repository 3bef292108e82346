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

    def as_decodes(self) -> StepPlan:
        """The same step with each token as a decode row of its own, at its position of the same slot."""
        of_T = np.repeat(np.arange(len(self.slots)), self.num_new)
        end_R = self.num_new.cumsum(dtype=np.int32)
        first_T = (end_R - self.num_new)[of_T]
        shared_R = np.pad(self.shared_lens, (0, len(self.slots) - self.num_decodes))
        return replace(
            self, slots=self.slots[of_T], starts=self.starts[of_T] + np.arange(len(of_T), dtype=np.int32) - first_T,
            num_new=np.ones_like(first_T), num_decodes=len(of_T), samples=end_R[self.samples] - 1,
            shared_lens=shared_R[of_T], group_starts=np.append(np.int32(0), end_R)[self.group_starts],
        )  # fmt: skip

    def with_drafts(self, drafts: list[list[int]]) -> tuple[StepPlan, list[int]]:
        """A plan of decodes with each row's drafts behind it; and the row that each row of it was before."""
        num_R = np.array([1 + len(draft) for draft in drafts], np.int32)
        ids = [i for token, draft in zip(self.token_ids.tolist(), drafts, strict=True) for i in (token, *draft)]
        plan = replace(self, num_new=num_R, token_ids=np.array(ids, np.int32)).as_decodes()
        first_R = num_R.cumsum(dtype=np.int32) - num_R
        banned = np.stack([first_R[self.banned[:, 0]], self.banned[:, 1]], 1)
        samples = np.arange(len(ids), dtype=np.int32)
        return replace(plan, samples=samples, banned=banned), np.repeat(np.arange(len(drafts)), num_R).tolist()
