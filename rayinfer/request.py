"""A row inside the engine, and what it becomes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from rayinfer.errors import RowError
from rayinfer.sampling import SamplingParams
from rayinfer.speculation import Lookup


@dataclass(slots=True)
class EncodedRow:
    """A row that an engine can take. `prompt` is the text that was tokenized, None if the row brought ids."""

    prompt_token_ids: list[int]
    params: SamplingParams
    prompt: str | None = None


@dataclass(slots=True)
class EngineStats:
    """Counts since the engine started; num_running, num_waiting and kv_usage (0 to 1) are of now."""

    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    num_finished: int = 0
    num_failed: int = 0
    num_preemptions: int = 0
    num_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0  # of those


@dataclass(slots=True)
class Logprob:
    """Log-probability of one token, and its rank among the vocabulary (1 is the likeliest)."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One completion, with vLLM's field names. `token_ids` holds the ending EOS or stop token too."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None  # "stop", "length", "error"
    stop_reason: int | str | None = None  # the stop token id or stop string, when one ended the row


@dataclass(slots=True)
class RequestOutput:
    """A finished row, with vLLM's field names; a failed one has `error_type`, and the tokens it had got until then."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    error_type: str | None = None
    error_message: str | None = None
    num_restarts: int = 0  # times that the row was begun again because its engine died


def failed_output(row: EncodedRow | None, error: RowError, request_id: str = "") -> RequestOutput:
    """The output of a row that never ran."""
    prompt, ids = (row.prompt, row.prompt_token_ids) if row else (None, [])
    outputs = [CompletionOutput(index=0, text="", token_ids=[], finish_reason="error")]
    return RequestOutput(request_id, prompt, ids, outputs, error_type=str(error.type), error_message=str(error))


@dataclass(slots=True, eq=False)
class Request:
    """A row's state in the engine. Token counts are of tokens, never of blocks.

    `num_scheduled` counts tokens whose KV is written or on its way (launched steps included); `num_pending`
    counts tokens that launched steps will yield and that the host has not read yet.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    prompt: str | None = None
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()  # EOS among them even if it is ignored: min_tokens bans it too
    max_total_tokens: int = 0  # prompt plus the most tokens that may be generated

    output_token_ids: list[int] = field(default_factory=list)
    output_logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=list)
    rank: int = 0  # the rows that wait are in this order
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    num_scheduled: int = 0
    num_pending: int = 0
    num_registered_blocks: int = 0  # leading blocks that the prefix cache knows
    prefix_id: int = 0  # the prefix cache's name for those blocks; 0 is the empty prefix
    group: int = -1  # rows of one group share a prefix that attention reads once; -1: alone
    num_cached_tokens: int = -1  # prompt tokens found in the prefix cache when first admitted
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error_type: str | None = None
    error_message: str | None = None
    lookup: Lookup | None = None  # for drafts, once there were any to be made
    twin_key: Hashable = None  # equal in greedy rows that ask for the very same: one of them runs
    leader: Request | None = None  # that one; None for itself
    twins: list[Request] = field(default_factory=list)  # and those that take its answer

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_known_tokens(self) -> int:
        """Prompt and generated tokens that the host has read."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """Known tokens and those still on the device."""
        return self.num_known_tokens + self.num_pending

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def fail(self, error: RowError) -> None:
        """End the row with an error."""
        self.finish_reason, self.error_type, self.error_message = "error", str(error.type), str(error)

    def tokens(self, start: int, stop: int) -> Sequence[int]:
        """Known tokens [start, stop) of prompt and output together."""
        num_prompt = len(self.prompt_token_ids)
        generated = self.output_token_ids[max(0, start - num_prompt) : max(0, stop - num_prompt)]
        return self.prompt_token_ids[start:stop] + generated
