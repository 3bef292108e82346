"""Run a job: refuse what is wrong on the driver, then read, answer, write, and check the row equation."""

from __future__ import annotations

import json
import logging
import os
import platform
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import ray
import ray.data
from rich.console import Console
from rich.text import Text

import rayinfer
from rayinfer.errors import ConfigError, ErrorType, RowError
from rayinfer.inputs import load_tokenizer
from rayinfer.models.load import inspect_model
from rayinfer.pipelines.job import JobSpec
from rayinfer.pipelines.keys import KeyDigest
from rayinfer.pipelines.progress import Progress
from rayinfer.pipelines.report import JobResult
from rayinfer.pipelines.sinks import (
    MARKER,
    Entry,
    PartWriter,
    check_apart,
    check_sink,
    clear,
    output_schema,
    sweep,
    write_whole,
)
from rayinfer.pipelines.sources import KEY, SOURCE, SOURCE_ERROR, Census, take_census
from rayinfer.pipelines.template import PromptTemplate
from rayinfer.processors import EngineProcessorConfig, StatsBoard, build_processor


@dataclass(frozen=True)
class Plan:
    """A job that was found to be right; nothing has been started or removed yet."""

    spec: JobSpec
    census: Census
    schema: pa.Schema  # of the output
    old_files: list[str]  # of an earlier run, in the output folder


def prepare(spec: JobSpec, *, overwrite: bool = False) -> Plan:
    """Check the whole job on the driver.

    Raises:
        ConfigError: anything that the user has to change; no engine was started, no file removed.
    """
    old_files = check_sink(spec.sink, overwrite=overwrite)
    census = take_census(spec.source)
    spec.template().check_columns(census.schema.names)
    schema = output_schema(census, spec)
    check_apart(spec.sink, census)
    on_cpu = spec.model.model_copy(update={"device": "cpu"})  # the driver may be a machine without a GPU
    inspect_model(on_cpu)
    if spec.messages is not None:
        tokenizer = load_tokenizer(on_cpu)
        if tokenizer is None or not tokenizer.chat_template:
            raise ConfigError(f"messages: the model {spec.model.model!r} has no chat template; write `prompt` instead")
    return Plan(spec, census, schema, old_files)


class RenderPrompt:
    """`preprocess` of the job: a source row becomes the prompt or the messages."""

    def __init__(self, template: PromptTemplate):
        self.template = template

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        if row[SOURCE_ERROR] is not None:
            raise RowError(ErrorType.INVALID_PROMPT, row[SOURCE_ERROR])
        return self.template.render(row[SOURCE])


def run_job(
    spec: JobSpec,
    *,
    overwrite: bool = False,
    address: str | None = None,
    verbose: bool = False,
    console: Console | None = None,
) -> JobResult:
    """Run a job to its end.

    Args:
        spec: from `load_job` or `JobSpec.parse`. overwrite: replace the output of an earlier job.
        address: Ray cluster; default: the Ray that this process is connected to, else one of its own on this machine.
        verbose: show Ray's own logs and progress. console: where to show progress; default: standard output.

    Returns:
        The figures. `status` is "complete" only if in = ok + failed holds by key; then the marker file is there.

    Raises:
        ConfigError: the job was refused; nothing was started.
    """
    console = console or Console()
    times = _Times()
    plan = prepare(spec, overwrite=overwrite)
    census = plan.census
    result = JobResult(output=spec.sink.uri, num_rows_in=census.num_rows, key_column=census.spec.id_column or KEY)
    console.print(Text(_intro(plan), style="dim"))
    parts: dict[str, int] = {}
    keys_out = KeyDigest()
    try:
        with Progress(console, census.num_rows) as progress:
            times.enter("start")
            progress.phase("starting Ray")
            with _ray(address, verbose), _Board(times) as board:
                times.enter("load")
                progress.phase("loading the model", board.poll)
                dataset = _dataset(plan, board.actor)
                clear(spec.sink, plan.old_files)
                try:
                    for entry in _entries(dataset):
                        times.enter("run")
                        result.add(entry)
                        parts[entry.name] = entry.num_bytes
                        keys_out.merge(KeyDigest.of(entry.num_rows, entry.keys))
                        progress.written(entry.num_rows)
                except KeyboardInterrupt:
                    progress.phase("stopping: ending the engines and Ray", counters=False)
                    raise
        times.enter("end")
        result.reason = _check(plan, result, parts, keys_out)
        result.seconds = times.seconds
        if not result.reason:
            result.status = "complete"
            write_whole(spec.sink.uri, MARKER, _marker(plan, result, parts))
    except KeyboardInterrupt:
        result.status, result.reason = "interrupted", "stopped before all rows were done"
    except ConfigError:
        raise
    except Exception as error:  # a lost node, a full disk, a bug: what was finished is told, and that it is not all
        if verbose:
            console.print_exception()
        result.status, result.reason = "incomplete", _cause(error)
    times.enter("end")
    result.seconds = times.seconds
    return result


class _Times:
    """Wall time by stage; a stage that was left is not entered again."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._stage, self._since = "check", time.monotonic()

    def enter(self, stage: str) -> None:
        if stage == self._stage or stage in self.seconds:
            return
        now = time.monotonic()
        self.seconds[self._stage] = now - self._since
        self._stage, self._since = stage, now


class _Board:
    """The actor that engines report to, asked from the display's thread until the job is over."""

    def __init__(self, times: _Times):
        self._times = times
        self._lock = threading.Lock()  # no call may be under way when Ray is shut down
        self._open = True

    def __enter__(self) -> _Board:
        self.actor = StatsBoard.remote()  # type: ignore[attr-defined]
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._open = False

    def poll(self) -> Mapping[str, Any] | None:
        with self._lock:
            if not self._open:
                return None
            try:
                stats = ray.get(self.actor.snapshot.remote(), timeout=2)
            except ray.exceptions.RayError:  # late or lost: the display shows what it had
                return None
        if stats["num_engines"]:
            self._times.enter("run")
        return stats


@contextmanager
def _ray(address: str | None, verbose: bool) -> Iterator[None]:
    """Ray for one job: quiet unless `verbose`, and gone afterwards if it was started here."""
    started = not ray.is_initialized()
    if started:
        with nullcontext() if verbose else _hushed_core():
            ray.init(
                address=address or "local",
                include_dashboard=None if address else False,
                log_to_driver=verbose,
                logging_level=logging.INFO if verbose else logging.CRITICAL,
            )
    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before = context.enable_progress_bars, context.print_on_execution_start, logger.level
    try:
        if not verbose:
            context.enable_progress_bars = context.print_on_execution_start = False
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        context.enable_progress_bars, context.print_on_execution_start = before[:2]
        logger.setLevel(before[2])
        if started:
            ray.shutdown()


@contextmanager
def _hushed_core() -> Iterator[None]:
    """Keep Ray's C++ core, which writes to our standard error, from doing so, for as long as this process lives.

    It is told by a variable that it reads when it starts, and then says that it was told: that goes to nowhere.
    """
    name, kept = "RAY_BACKEND_LOG_LEVEL", os.dup(2)
    users = os.environ.get(name)
    os.environ[name] = users or "fatal"
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        if users is None:
            del os.environ[name]


def _dataset(plan: Plan, board: Any) -> ray.data.Dataset:
    """The whole job as a lazy dataset whose rows are entries of parts."""
    spec = plan.spec
    config = EngineProcessorConfig(
        model_source=spec.model.model,
        engine_kwargs=spec.model.model_dump(exclude_unset=True, exclude={"model"}),
        sampling_params=spec.sampling,
        on_error=spec.on_error,
        **spec.processor.model_dump(exclude_none=True),
    )
    processor = build_processor(config, preprocess=RenderPrompt(spec.template()), stats_actor=board)
    finished = processor(plan.census.dataset())
    writer = PartWriter(spec.sink, plan.schema)
    return finished.map_batches(writer, batch_size=spec.sink.rows_per_part, batch_format="pyarrow")


def _entries(dataset: ray.data.Dataset) -> Iterator[Entry]:
    """Run the dataset; only entries come to the driver, however many rows there are."""
    for row in dataset.iter_rows():
        yield Entry(**json.loads(row["entry"]))


def _check(plan: Plan, result: JobResult, parts: dict[str, int], keys_out: KeyDigest) -> str:
    """Return why the table is not complete, or an empty string; remove files that no entry names."""
    reason = result.check_equation(plan.census.key_digest(), keys_out)
    wrong = [] if reason else sweep(plan.spec.sink, parts)
    if not wrong:
        return reason
    return (
        f"{len(wrong)} part(s) that workers wrote are not in {plan.spec.sink.uri!r} as the driver sees it (first: "
        f"{wrong[0]}); the folder must be one that all nodes share"
    )


def _marker(plan: Plan, result: JobResult, parts: dict[str, int]) -> bytes:
    """The success marker: figures and parts. No row of the table is in it."""
    marker = {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        **{key: value for key, value in result.as_dict().items() if key not in ("samples", "reason")},
        "job": plan.spec.model_dump(mode="json", exclude_unset=True),
        "versions": {"rayinfer": rayinfer.__version__, "ray": ray.__version__, "python": platform.python_version()},
        "parts": [{"name": name, "num_bytes": num_bytes} for name, num_bytes in sorted(parts.items())],
    }
    return json.dumps(marker, indent=1).encode()


def _intro(plan: Plan) -> str:
    census = plan.census
    left_out = f", {census.num_skipped_files} left out" if census.num_skipped_files else ""
    files = f"{census.num_files:,} file{'s' * (census.num_files != 1)}"
    source = f"{census.num_rows:,} rows from {files} ({census.format}{left_out})"
    return f"{source}: {census.spec.uri}\nmodel: {plan.spec.model.model}"


def _cause(error: BaseException) -> str:
    """The innermost cause of a failed Ray task, without Ray's frames."""
    while isinstance(inner := getattr(error, "cause", None) or error.__cause__, BaseException):
        error = inner
    text = str(error).strip() or repr(error)
    return text if isinstance(error, ConfigError | RowError) else f"{type(error).__name__}: {text.splitlines()[-1]}"
