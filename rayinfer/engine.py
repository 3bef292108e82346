"""The engine: schedule step N + 1, launch it, then read step N.

This file carries the idea; what a step holds is in scheduler.py, who owns the KV in kv_cache.py, how a step is carried
out in runner/. The engine knows nothing of Ray, and one thread drives it (`engine_process.EngineProcess` for many).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
from collections import deque
from collections.abc import Callable, Hashable
from copy import copy
from dataclasses import replace

import torch

from rayinfer.attention import get_backend
from rayinfer.config import EngineConfig
from rayinfer.errors import ConfigError, ErrorType, RowError
from rayinfer.host import num_cores
from rayinfer.inputs import InputProcessor, check_length
from rayinfer.kv_cache import BlockPool
from rayinfer.models.load import load_model
from rayinfer.models.model import ModelInfo
from rayinfer.pace import LAUNCH
from rayinfer.request import CompletionOutput, EncodedRow, EngineStats, Logprob, Request, RequestOutput
from rayinfer.runner import Runner, StepHandle
from rayinfer.runner.memory import is_out_of_memory, num_kv_blocks
from rayinfer.runner.runner import TopLogprobs
from rayinfer.scheduler import Scheduler, Step
from rayinfer.text import final_text, find_stop_string

logger = logging.getLogger(__name__)

DEFAULT_MAX_NUM_SEQS = {"cuda": 1024, "cpu": 64}
# No multiple of 64, for which cuBLAS takes tiles that are 1 to 2 % slower (benchmarks/NOTES.md).
DEFAULT_MAX_NUM_BATCHED_TOKENS = {"cuda": 16376, "cpu": 1024}
# The tokens that go by while a step with prompts is launched are few, and prompts dear, for models of some billions of
# parameters: their prompts come in small steps if those do. To a small model, such steps cost more than they spare.
MAX_LAG = 2048
MAX_DRAFT_STEP = {"cuda": 256, "cpu": 64}  # tokens of a step with drafts: the model's weights take as long for one


class Engine:
    """One replica: a model, its KV cache and the loop over them.

    Args:
        weights: of the model, if they were read ahead (`start.start_engine`).

    Raises:
        ConfigError: the model or a limit in `config` cannot be used.
    """

    def __init__(self, config: EngineConfig, weights: Callable[[ModelInfo], dict[str, torch.Tensor]] = lambda _: {}):
        self.config = config
        self.model = load_model(config, weights)
        self.device, self.info = self.model.device, self.model.info
        if self.device.type == "cpu":
            torch.set_num_threads(config.num_threads or num_cores())
            _keep_freed_memory()
        self.inputs = InputProcessor(config, info=self.info)
        self.tokenizer = tokenizer = self.inputs.tokenizer
        ends = *self.info.eos_token_ids, getattr(tokenizer, "eos_token_id", None)  # vLLM stops at both kinds
        self._eos_token_ids = frozenset(id for id in ends if id is not None and 0 <= id < self.info.vocab_size)
        self._piece = functools.cache(lambda token: None if tokenizer is None else str(tokenizer.decode([token])))
        kind = self.device.type
        self.max_num_seqs = config.max_num_seqs or DEFAULT_MAX_NUM_SEQS[kind]
        self.max_num_batched_tokens = config.max_num_batched_tokens or DEFAULT_MAX_NUM_BATCHED_TOKENS[kind]
        self.max_model_len = self.inputs.max_model_len
        names = config.prefill_backend, config.decode_backend
        prefill, decode = (get_backend(name, self.device, config.deterministic) for name in names)
        for spec in self.model.specs:
            for backend in (prefill, decode):
                backend.check(spec, self.model.dtype, config.block_size)
        self.runner = Runner(
            self.model, prefill, decode, max_num_seqs=self.max_num_seqs, max_model_len=self.max_model_len,
            block_size=config.block_size, use_graphs=decode.in_graphs and not config.enforce_eager,
        )  # fmt: skip
        num_blocks = num_kv_blocks(config, self.runner, self.max_num_seqs, self.max_num_batched_tokens)
        self._fit_model_len((num_blocks - 1) * config.block_size)
        self.runner.allocate(num_blocks)
        self.runner.capture_graphs()
        self.pool = BlockPool(num_blocks, config.block_size, config.enable_prefix_caching)
        graphs = self.runner.graphs
        lag = int(LAUNCH * self.info.num_layers / sum(weight.numel() for weight in self.model.module.parameters()))
        mixed = graphs.mixed() if graphs and lag <= MAX_LAG else ((), 0)
        limits = self.max_num_seqs, self.max_num_batched_tokens, MAX_DRAFT_STEP[kind]
        self.scheduler = Scheduler(self.pool, *limits, mixed, lag)
        self.stats = EngineStats()
        self.on_admit: Callable[[list[str]], object] | None = None  # told the ids of rows before they run
        self._requests: dict[str, Request] = {}
        self._leaders: dict[Hashable, Request] = {}  # of greedy rows; see Request.twins
        self._in_flight: deque[tuple[Step, StepHandle]] = deque()
        self._num_added = 0

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    def step(self) -> list[RequestOutput]:
        """Launch the next step, then read the one before it; returns the rows that it finished."""
        step = None
        if self._in_flight and self.scheduler.drafts(self.scheduler.running):
            return self._read(*self._in_flight.popleft())  # drafts go on from tokens that have been read
        try:
            step = self.scheduler.schedule()
            if step is not None:
                if self.on_admit is not None and self.scheduler.admitted:
                    self.on_admit([request.request_id for request in self.scheduler.admitted])
                self._in_flight.append((step, self.runner.launch(step.plan)))
        except BaseException as error:  # Ctrl-C too: the prefix cache knows blocks that this step was to write
            self.pool.reset_prefix_cache()
            if step is None or not is_out_of_memory(error):
                raise
            return self._shrink(step, error)
        if step is not None:
            self.stats.num_steps += 1
            self.stats.num_draft_tokens += step.num_drafts
            if len(self._in_flight) <= self.runner.run_ahead and not step.num_drafts:
                return []
        if not self._in_flight:
            assert not self.has_work, "rows are left, none can be scheduled and no step is in flight"
            return []
        # Of a step with drafts, the next one's tokens are known only when it was read, and one may be before it.
        num_read = len(self._in_flight) if step is not None and step.num_drafts else 1
        return [output for _ in range(num_read) for output in self._read(*self._in_flight.popleft())]

    def add(self, request_id: str, row: EncodedRow) -> None:
        """Queue a row.

        Raises:
            RowError: it cannot run on this engine. ValueError: the id is in use.
        """
        if request_id in self._requests:
            raise ValueError(f"request_id = {request_id!r}: a row with this id is running")
        check_length(len(row.prompt_token_ids), self.max_model_len)
        params, num_prompt = row.params, len(row.prompt_token_ids)
        if params.stop and self.tokenizer is None:
            raise RowError(ErrorType.INVALID_SAMPLING_PARAMS, "stop: no tokenizer (skip_tokenizer_init)")
        most = self.max_model_len - num_prompt
        self._num_added += 1
        request = Request(
            request_id, row.prompt_token_ids, params, row.prompt,
            seed=params.seed if params.seed is not None else self._row_seed(row),
            stop_token_ids=self._eos_token_ids.union(params.stop_token_ids),
            max_total_tokens=num_prompt + min(params.max_tokens or most, most),
            prompt_logprobs=[None],  # nothing comes before the first token
        )  # fmt: skip
        self._requests[request_id] = request
        if params.temperature == 0:
            request.twin_key = tuple(row.prompt_token_ids), params
            leader = self._leaders.setdefault(request.twin_key, request)
            if leader is not request:
                request.leader = leader
                leader.twins.append(request)
                return
        self.scheduler.add(request)

    def abort_all(self) -> None:
        """Take all rows out now, and drop what they had."""
        for request in list(self._requests.values()):
            if request.leader is None:  # twins end with theirs
                self._end(request, RowError(ErrorType.ABORTED, "aborted by the caller"))

    def snapshot(self) -> EngineStats:
        """The engine's counts now."""
        stats = self.stats
        stats.num_running, stats.num_waiting = len(self.scheduler.running), len(self.scheduler.waiting)
        stats.kv_usage, stats.num_preemptions = self.pool.usage, self.scheduler.num_preemptions
        return stats

    def _shrink(self, step: Step, error: BaseException) -> list[RequestOutput]:
        """Go on with smaller steps after one that found no memory; all rows are computed again."""
        finished = []
        while self._in_flight:
            finished += self._read(*self._in_flight.popleft())
        for request in {step.rows[index] for index in step.plan.samples.tolist()}:
            request.num_pending -= 1
        if not self.scheduler.shrink():
            raise error
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        most = self.scheduler.max_num_batched_tokens, self.scheduler.num_slots
        logger.warning("out of memory: at most %d tokens a step and %d rows from here on (%s)", *most, error)
        return finished

    def _read(self, step: Step, handle: StepHandle) -> list[RequestOutput]:
        """Wait for a step, and append its tokens to its rows."""
        finished, result = [], handle.read()
        self._split_prompt_logprobs(step, result.prompt_logprobs)
        before, is_right = None, True
        samples, token_ids = step.plan.samples.tolist(), result.token_ids.tolist()
        for number, (index, token) in enumerate(zip(samples, token_ids, strict=True)):
            request = step.rows[index]
            is_draft, before = request is before, request
            is_right = not is_draft or (is_right and step.plan.token_ids[index] == token_ids[number - 1])
            request.num_pending -= not is_draft
            if request.finished or not is_right:
                continue  # it ended a step ago, when this one was on its way already, or with a draft before
            if is_draft:
                request.num_scheduled += 1  # its KV is there already
                self.stats.num_accepted_tokens += 1
            if token < 0:
                error = RowError(ErrorType.NAN_LOGITS, "the model's logits for this row are NaN or infinite")
                finished += self._end(request, error)
                continue
            request.output_token_ids.append(token)
            self.stats.num_generated_tokens += 1
            if request.params.logprobs is not None and result.logprobs is not None:
                entry = self._logprob_entry(result.logprobs, number, token, request.params.logprobs)
                request.output_logprobs.append(entry)
            if self._ends(request, token):
                finished += self._end(request)
        return finished

    def _ends(self, request: Request, token: int) -> bool:
        """Set finish_reason if this token is the row's last."""
        if len(request.output_token_ids) >= request.params.min_tokens:
            is_eos = token in self._eos_token_ids and not request.params.ignore_eos
            if is_eos or token in request.params.stop_token_ids:
                request.finish_reason = "stop"
                request.stop_reason = None if is_eos else token
                return True
            if request.params.stop and self.tokenizer is not None:
                request.stop_reason = find_stop_string(self.tokenizer, request)
                if request.stop_reason is not None:
                    request.finish_reason = "stop"
                    return True
        if len(request.prompt_token_ids) + len(request.output_token_ids) < request.max_total_tokens:
            return False
        request.finish_reason = "length"
        return True

    def _end(self, request: Request, error: RowError | None = None) -> list[RequestOutput]:
        """Free what a row holds and make its output, and that of its twins."""
        if error is not None:
            request.fail(error)
        if request.leader is None:
            self.scheduler.finish(request, forget=request.error_type == ErrorType.NAN_LOGITS)
        if self._leaders.get(request.twin_key) is request:
            del self._leaders[request.twin_key]
        stats, outputs = self.stats, [self._output(request)]
        for row in (request, *request.twins):
            output = outputs[0]
            if row is not request:
                own, prompt_logprobs = output.outputs[0], copy(output.prompt_logprobs)
                own = replace(own, token_ids=copy(own.token_ids), logprobs=copy(own.logprobs))
                output = replace(
                    output, request_id=row.request_id, prompt=row.prompt, prompt_token_ids=row.prompt_token_ids,
                    outputs=[own], num_cached_tokens=row.num_prompt_tokens, prompt_logprobs=prompt_logprobs,
                )  # fmt: skip
                outputs.append(output)
            del self._requests[row.request_id]
            stats.num_finished += 1
            stats.num_failed += output.error_type is not None
            stats.num_prompt_tokens += row.num_prompt_tokens
            stats.num_cached_tokens += output.num_cached_tokens
            stats.num_generated_tokens += len(request.output_token_ids) * (row is not request)
        return outputs

    def _output(self, request: Request) -> RequestOutput:
        params = request.params
        text = ""
        if self.tokenizer is not None and params.detokenize and request.error_type is None:
            text = final_text(self.tokenizer, request)
        completion = CompletionOutput(
            index=0, text=text, token_ids=request.output_token_ids,
            logprobs=request.output_logprobs if params.logprobs is not None else None,
            finish_reason=request.finish_reason, stop_reason=request.stop_reason,
        )  # fmt: skip
        if completion.logprobs is not None:
            pairs = zip(completion.logprobs, completion.token_ids, strict=True)
            completion.cumulative_logprob = sum(entry[token].logprob for entry, token in pairs)
        return RequestOutput(
            request_id=request.request_id, prompt=request.prompt, prompt_token_ids=request.prompt_token_ids,
            outputs=[completion], num_cached_tokens=max(request.num_cached_tokens, 0),
            prompt_logprobs=request.prompt_logprobs if params.prompt_logprobs is not None else None,
            error_type=request.error_type, error_message=request.error_message,
        )  # fmt: skip

    def _split_prompt_logprobs(self, step: Step, tops: TopLogprobs | None) -> None:
        """Give prompt log-probabilities to the rows whose chunks they belong to."""
        if tops is None:
            return
        plan, row, first, end = step.plan, -1, 0, 0
        for number, (token_index, target) in enumerate(plan.prompt_targets.tolist()):
            while token_index >= end:
                row, first = row + 1, end
                end += int(plan.num_new[row])
            request = step.rows[row]
            position = int(plan.starts[row]) + token_index - first + 1
            if position == len(request.prompt_logprobs):  # a preempted row computes some again
                num_top = request.params.prompt_logprobs or 0
                request.prompt_logprobs.append(self._logprob_entry(tops, number, target, num_top))

    def _logprob_entry(self, tops: TopLogprobs, number: int, token: int, num_top: int) -> dict[int, Logprob]:
        """{token: Logprob} of the given token and the `num_top` likeliest."""
        values, ids = tops.values[number].tolist(), tops.ids[number].tolist()
        entry = {token: Logprob(values[0], int(values[1]), self._piece(token))}
        for rank, (other, value) in enumerate(zip(ids[:num_top], values[2:], strict=False), start=1):
            entry.setdefault(other, Logprob(value, rank, self._piece(other)))
        return entry

    def _row_seed(self, row: EncodedRow) -> int:
        """A stream of its own for a row that brings no seed, the same in every run of the same rows.

        By its place among the rows; in deterministic mode by its prompt.
        """
        number = self._num_added
        if self.config.deterministic:
            number = int.from_bytes(hashlib.blake2b(repr(row.prompt_token_ids).encode(), digest_size=8).digest())
        return (self.config.seed * 0x9E3779B97F4A7C15 + number) % 2**63

    def _fit_model_len(self, capacity: int) -> None:
        """Rows may not be longer than the KV cache: lower the model's own limit, refuse an asked-for one."""
        if self.max_model_len <= capacity:
            return
        if self.config.max_model_len is not None:
            raise ConfigError(
                f"max_model_len = {self.max_model_len}: the KV cache holds {capacity} tokens; lower max_model_len, or "
                f"give the cache more memory (gpu_memory_utilization, cpu_kv_cache_gib, num_gpu_blocks_override)"
            )
        logger.warning("max_model_len lowered from %d to the KV cache's %d tokens", self.max_model_len, capacity)
        self.max_model_len = capacity


def _keep_freed_memory() -> None:
    """Tell glibc not to give a step's memory back to the system: the next step would take page faults for it anew.

    Threads other than the first have heaps of their own, which glibc trims early: time in the system fell from 22 % to
    7 % with the limits, and the time of a job by 6 % more with one heap for all. Other C libraries are left alone. The
    numbers are M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_ARENA_MAX of mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-1, 2**30)
        mallopt(-3, 2**25)
        mallopt(-8, 1)
