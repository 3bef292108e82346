"""The Ray Data operator around an engine: `LLMProcessor`, a class for `Dataset.map_batches`."""

from __future__ import annotations

import contextlib
import functools
import importlib
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import ray
from ray.data.block import DataBatch

from rayinfer.config import EngineConfig
from rayinfer.engine_process import EngineProcess
from rayinfer.errors import ErrorType, RowError
from rayinfer.host import num_cores
from rayinfer.processors import columns as col
from rayinfer.processors.drain import DrainWatch
from rayinfer.processors.ray_compat import keep_yielded_blocks, take_rows, task_attempt, to_arrow
from rayinfer.processors.stats import report_every_second
from rayinfer.request import EncodedRow, RequestOutput
from rayinfer.sampling import SamplingParams

if TYPE_CHECKING:
    from rayinfer.inputs import InputProcessor

INPUTS = ("messages", "prompt", "prompt_token_ids")
MIN_ROWS_PER_BLOCK = 4
MIN_BLOCK_SECONDS = 0.05
BLOCK_SECONDS = 1.0  # a finished row waits no longer for others to share its block

keep_yielded_blocks()


class LLMProcessor:
    """Answers the rows of the batches it is called with, all calls at once in one running batch of one engine.

    Input columns: one of `messages`, `prompt`, `prompt_token_ids` that is not null, and maybe `sampling_params`, a
    struct or JSON text. Every column passes through; columns.OUTPUT names what is appended, and what takes the place of
    an earlier processor's. A failed row has `error_type`.

        ds.map_batches(
            LLMProcessor,
            fn_constructor_kwargs=dict(model="path", sampling_params=dict(temperature=0), max_model_len=2048),
            compute=ray.data.ActorPoolStrategy(size=1, max_tasks_in_flight_per_actor=16,
                                               max_concurrent_calls_per_actor=8),
            batch_size=64, batch_format="pyarrow", num_gpus=1)

    A call yields its rows in blocks of a quarter of the batch as soon as a block's rows are done, those that may be
    short first. Which rows are in which block depends on the batch alone: when a worker dies, Ray runs its calls again
    and skips as many blocks as it already has, so blocks made in the order in which rows end would lose some rows and
    repeat others. For a caller who finds out such rows by key, `any_rows` lets a call yield whatever rows of the engine
    are done, and end when as many are done as it and the calls before it brought: no row waits for another, and no call
    for a row that is far longer.

    Args:
        model: local folder, hub id, or a single .gguf file.
        sampling_params: for what a row's own `sampling_params` leave open.
        chat_template, chat_template_kwargs: instead of, and passed to, the tokenizer's own template.
        on_error: "record" makes a failed row an error row; "raise" stops the job with an error that names the row.
        stats_actor: handle of a StatsBoard, told about the engine each second.
        any_rows: calls yield rows of one another; see above.
        num_warm: workers that are made ready for the stage behind once the engine is there; one for a core at most.
        engine: one that runs already and is shared, with these engine_kwargs.
        engine_kwargs: the other fields of EngineConfig.

    Raises:
        ConfigError: a setting or the model cannot be used, or a column that no processor made has an output's name.
        RowError: a row failed and on_error is "raise".
    """

    yields_blocks = True

    def __init__(
        self, model: str, *, sampling_params: SamplingParams | Mapping[str, Any] | None = None,
        chat_template: str | None = None, chat_template_kwargs: Mapping[str, Any] | None = None,
        on_error: Literal["record", "raise"] = "record", stats_actor: Any = None, any_rows: bool = False,
        num_warm: int = 0, engine: EngineProcess | None = None, **engine_kwargs: Any,
    ):  # fmt: skip
        self._drain = DrainWatch()
        self._defaults, self._on_error = sampling_defaults(sampling_params), on_error
        self._asked = [name for name in col.WHEN_ASKED if self._defaults.get(name) is not None]
        self._config = EngineConfig.parse(model=model, **engine_kwargs)
        self._template = chat_template, chat_template_kwargs
        self._engine = engine or EngineProcess(self._config)
        for _ in range(min(num_warm, num_cores() - 1)):
            _warm.remote(1.0 if self._config.device.startswith("cuda") else 0.0)
        self._done: queue.SimpleQueue[_Done] | None = queue.SimpleQueue() if any_rows else None
        self._turn, self._gathering = threading.Condition(), False  # for any_rows: the call that makes a block
        self._num_brought = self._num_given = 0  # rows of all calls
        self._end_reports = stats_actor and report_every_second(stats_actor, self._engine.id, self._engine.stats)

    def __call__(self, batch: DataBatch) -> Iterator[pa.Table]:
        """Yield the batch's rows with the output columns, in tables of a few rows, not in the batch's order."""
        with self._drain.call():
            yield from self._answer(to_arrow(batch))

    def _answer(self, table: pa.Table) -> Iterator[pa.Table]:
        encoded = self._encode(table)
        table = col.without(table, col.ENCODED.names)
        failed = {index: row for index, row in enumerate(encoded) if isinstance(row, RowError)}
        good = [(index, row) for index, row in enumerate(encoded) if not isinstance(row, RowError)]
        good.sort(
            key=lambda entry: (entry[1].params.max_tokens or 2**31, len(entry[1].prompt_token_ids)),
            reverse=self._done is not None,  # where no row waits for another, the long ones are not to be the last
        )
        source = _Source(table, self._columns([row.params for _, row in good], table.column_names), task_attempt())
        col.refuse_taken(table.column_names, source.columns.names)
        errors = self._block(source, failed) if failed else None  # before the engine has the others: it may raise
        with self._turn:
            self._num_brought += len(good)
            last = self._num_brought
        done = self._done or queue.SimpleQueue()
        self._engine.submit(
            [row for _, row in good], lambda place, output: done.put(_Done(source, place, good[place][0], output))
        )
        if errors is not None:
            yield errors
        if self._done:
            yield from self._as_they_end(done, last)
        else:
            yield from self._in_order(done, len(good), max(MIN_ROWS_PER_BLOCK, -(-table.num_rows // 4)))

    def _in_order(self, done: queue.SimpleQueue[_Done], num_rows: int, size: int) -> Iterator[pa.Table]:
        """Blocks of `size` rows, in the order of their places."""
        waiting: dict[int, _Done] = {}
        for start in range(0, num_rows, size):
            places = range(start, min(start + size, num_rows))
            while not all(place in waiting for place in places):
                entry = self._next(done, None)
                assert entry is not None
                waiting[entry.place] = entry
            entries = [waiting.pop(place) for place in places]
            yield self._block(entries[0].source, {entry.index: entry.output for entry in entries})

    def _as_they_end(self, done: queue.SimpleQueue[_Done], last: int) -> Iterator[pa.Table]:
        """Rows of whatever call, until as many were handed on as all calls up to this one brought, `last`.

        One call at a time gathers them, for a second or a quarter of what is under way: all at once would make blocks
        of few rows, and end together. A block takes at least 50 ms: each costs Ray some.
        """
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._num_given >= last or not self._gathering)
                if self._num_given >= last:
                    return
                self._gathering = True
            entries: list[_Done] = []
            leaving = self._drain.leaving
            try:
                entries = self._gather(done, 0.0 if leaving else BLOCK_SECONDS)
            finally:
                with self._turn:
                    self._gathering = False
                    self._num_given += len(entries)
                    self._turn.notify_all()
            if entries:
                by_source: dict[_Source, dict[int, RequestOutput]] = {}
                for entry in entries:
                    by_source.setdefault(entry.source, {})[entry.index] = entry.output
                blocks = [self._block(source, results) for source, results in by_source.items()]
                alike = all(block.schema.equals(blocks[0].schema) for block in blocks)
                yield from [pa.concat_tables(blocks)] if alike else blocks
            elif leaving:
                return  # the rows that are left are found by number

    def _gather(self, done: queue.SimpleQueue[_Done], seconds: float) -> list[_Done]:
        begin, num_left = time.monotonic(), self._num_brought - self._num_given
        entries: list[_Done] = []
        while len(entries) < num_left:
            few = len(entries) < max(MIN_ROWS_PER_BLOCK, num_left // 4)
            until = begin + (seconds if few else min(seconds, MIN_BLOCK_SECONDS))
            if (entry := self._next(done, max(0.0, until - time.monotonic()))) is None:
                break
            entries.append(entry)
        return entries

    def _next(self, done: queue.SimpleQueue[_Done], seconds: float | None) -> _Done | None:
        """The next row that is done; None if none was in so many seconds."""
        try:
            entry = done.get(timeout=seconds)
        except queue.Empty:
            entry = None
        if self._engine.error is not None:
            lost = "the engine cannot go on; its rows are not lost, they have no result"
            raise RuntimeError(lost) from self._engine.error
        return entry

    def close(self) -> None:
        """End the engine and free its memory."""
        self._drain.close()
        if self._end_reports is not None:
            self._end_reports()
        self._engine.close()

    def __del__(self) -> None:  # Ray Data drops the object when its pool ends
        if hasattr(self, "_end_reports"):
            self.close()

    @functools.cached_property
    def _inputs(self) -> InputProcessor:
        """Of rows that no stage before this one has encoded; it loads torch and transformers into this process."""
        from rayinfer.inputs import InputProcessor

        return InputProcessor(self._config.model_copy(update={"device": "cpu"}), *self._template)

    def _encode(self, table: pa.Table) -> list[EncodedRow | RowError]:
        """Each row encoded, by a stage before this one or here."""
        if col.TOKEN_IDS not in table.column_names:
            names = [name for name in (*INPUTS, "sampling_params") if name in table.column_names]
            rows, unread = col.to_rows(table.select(names)) if names else ([{}] * table.num_rows, {})
            encoded = self._inputs.encode_batch([with_defaults(row, self._defaults) for row in rows])
            return [unread.get(index, row) for index, row in enumerate(encoded)]
        values = table.select(col.ENCODED.names).to_pydict()
        return [
            EncodedRow(ids, _params_of(params)) if kind is None else RowError(ErrorType(kind), message, stage)
            for ids, params, kind, stage, message in zip(*values.values(), strict=True)
        ]

    def _columns(self, params: list[SamplingParams], names: list[str]) -> pa.Schema:
        """OUTPUT, with log-probabilities if the job or a row of this batch asks for them, or an earlier stage did."""
        old = names if sum(name in names for name in col.ERROR_COLUMNS) > 1 else ()  # an earlier processor's
        asked = {*self._asked, *old, *(n for n in col.WHEN_ASKED if any(getattr(one, n) is not None for one in params))}
        return pa.schema([field for field in col.OUTPUT if field.name in asked or field.name in col.ALWAYS])

    def _block(self, source: _Source, results: Mapping[int, RequestOutput | RowError]) -> pa.Table:
        rows = [col.output_row(result, source.attempt) for result in results.values()]
        if self._on_error == "raise":
            for row, index in zip(rows, results, strict=True):
                if (error := col.error_of(row)) is not None:
                    col.raise_row(error, col.to_rows(source.table.slice(index, 1))[0][0], index)
        return col.with_columns(take_rows(source.table, list(results)), col.table_of(rows, source.columns))


@ray.remote(num_cpus=0)
def _warm(delay: float) -> None:
    """Import in a worker, while the engine has its first rows, what the last stage needs.

    All rows may end at once, those that were planned so do: then a cold worker for each block takes 1 to 2 s. A GPU's
    many workers wait for `delay` seconds: its first rows come first, and no worker takes another one's call.
    """
    time.sleep(delay)
    importlib.import_module("rayinfer.processors.stages")


@dataclass(frozen=True, eq=False)
class _Source:
    """A call's batch: its rows, the output columns they get, and which attempt at them this is."""

    table: pa.Table
    columns: pa.Schema
    attempt: int


@dataclass(frozen=True)
class _Done:
    """A finished row: its call, its place among the call's good rows, its index in the call's table."""

    source: _Source
    place: int
    index: int
    output: RequestOutput


def sampling_defaults(value: SamplingParams | Mapping[str, Any] | None) -> dict[str, Any]:
    """What a job's sampling parameters set, checked. Raises RowError as SamplingParams.from_row does."""
    return SamplingParams.from_row(value).model_dump(exclude_unset=True)


def as_mapping(params: Any) -> Any:
    """What SamplingParams set, also as JSON, which a result has; parameters that are none come back as they are."""
    if isinstance(params, str | list):  # JSON, a map's entries
        with contextlib.suppress(RowError):  # the row's check tells what is wrong
            params = SamplingParams.from_row(params)
    return params.model_dump(exclude_unset=True) if isinstance(params, SamplingParams) else params


def with_defaults(row: Mapping[str, Any], defaults: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row, its sampling parameters completed; what is no mapping is left for the row's check to refuse."""
    own = as_mapping(row.get("sampling_params"))
    if own is None or isinstance(own, Mapping):
        given = {key: value for key, value in (own or {}).items() if value is not None}
        row = {**row, "sampling_params": {**defaults, **given}}
        with contextlib.suppress(RowError):  # as above; checked here, a None of the defaults' keeps its meaning
            row = {**row, "sampling_params": SamplingParams.from_row(row["sampling_params"])}
    return row


_params_of = functools.lru_cache(maxsize=1024)(SamplingParams.model_validate_json)  # most rows have the same ones
