"""Run a job: refuse what is wrong on the driver, then read, answer, write, and check the row equation."""

from __future__ import annotations

import gc
import json
import logging
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
import ray.data
from rich.console import Console
from rich.text import Text

import rayinfer
from rayinfer.chat import ControlTokens
from rayinfer.errors import ConfigError, ErrorType, RowError, Stage, bare_uri
from rayinfer.pipelines.collect import MAX_FRUITLESS_ROUNDS, Block, RayWrites, Written, collect_all
from rayinfer.pipelines.identity import FORMATS, JOB, check_same, claim_job, fingerprint, read_job
from rayinfer.pipelines.job import JobSpec
from rayinfer.pipelines.log import PART_PREFIX, CommitLog, Lease, OutputTakenError, part_ids
from rayinfer.pipelines.progress import Progress
from rayinfer.pipelines.report import NUM_SAMPLES, JobResult
from rayinfer.pipelines.sinks import MARKER, PartWriter, check_apart, check_sink, output_schema
from rayinfer.pipelines.sources import KEY, SOURCE, SOURCE_ERROR, Census, list_source, take_census
from rayinfer.pipelines.store import META, Store
from rayinfer.pipelines.tables import Table, open_table
from rayinfer.pipelines.template import PromptTemplate
from rayinfer.processors import EngineProcessorConfig, Processor, StatsBoard
from rayinfer.processors.ray_compat import finished_blocks

if TYPE_CHECKING:
    from rayinfer.inputs import InputProcessor


@dataclass(frozen=True)
class Plan:
    """A job that was found to be right; nothing has been started or removed yet."""

    spec: JobSpec
    store: Store  # the output
    fingerprint: dict[str, Any]
    census: Census
    schema: pa.Schema  # of the output
    log: CommitLog | None  # of the same job's earlier runs; None: it begins
    marker: dict[str, Any] | None  # of the success that the log tells of
    table: Table | None = None  # that follows the log; None: the sink is files alone
    overwrite: bool = False  # another job's output
    replay: bool = False  # the failed rows of a job that is complete
    inputs: InputProcessor | None = None  # of the model on a CPU; None: nothing is left to do


def prepare(spec: JobSpec, *, overwrite: bool = False, replay: bool = False) -> Plan:
    """Check the whole job on the driver.

    Raises:
        ConfigError: anything that the user has to change; no engine was started, no file removed.
    """
    store = check_sink(spec.sink, overwrite=overwrite)
    listing = list_source(spec.source)
    check_apart(spec.sink, spec.source, listing)
    same = fingerprint(spec, listing)
    job = None if overwrite else read_job(store)
    log = marker = None
    if job is None:
        if replay:
            raise ConfigError(f"sink.uri = {spec.sink.uri!r}: no job's output, so no failed rows to run again")
        census = take_census(spec.source, listing)
    else:
        if (old := job["fingerprint"].get("format")) in FORMATS:
            same["format"] = old
        check_same(job, same, spec.sink.uri)
        census = Census.unpack(spec.source, job["census"])
        log = CommitLog(store, job["id"], census.num_rows)
        marker = read_marker(store, log)
    spec.template().check_columns(census.schema.names)
    table, schema = open_table(spec.sink, store), output_schema(census, spec, same["format"])
    if table is not None:
        schema = table.fit(schema)
    inputs = None
    if marker is None or (replay and marker["num_failed"]):
        from rayinfer.inputs import InputProcessor  # not for a job that is complete: transformers costs seconds

        inputs = InputProcessor(spec.model.model_copy(update={"device": "cpu"}))  # the driver may have no GPU
        if spec.messages is not None and not getattr(inputs.tokenizer, "chat_template", None):
            raise ConfigError(f"messages: model {spec.model.model!r} has no chat template; write `prompt` instead")
    replay = replay and marker is not None  # else the rows of an earlier replay are still to do
    return Plan(spec, store, same, census, schema, log, marker, table, overwrite, replay, inputs)


def read_marker(store: Store, log: CommitLog) -> dict[str, Any] | None:
    """The success marker, if it is of the log as it stands now."""
    try:
        marker = json.loads(store.read(MARKER))
    except (FileNotFoundError, ValueError):
        return None
    return marker if marker.get("log") == [log.job_id, len(store.sizes(log.folder))] else None


class RenderPrompt:
    """`preprocess` of the job: a source row becomes the prompt or the messages."""

    control_tokens: ControlTokens | None = None  # set where the tokenizer is

    def __init__(self, template: PromptTemplate):
        self.template = template

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        if row[SOURCE_ERROR] is not None:
            raise RowError(ErrorType.INVALID_PROMPT, row[SOURCE_ERROR], Stage.READ)
        return self.template.render(row[SOURCE], self.control_tokens)


def run_job(
    spec: JobSpec, *, overwrite: bool = False, replay: bool = False, address: str | None = None,
    verbose: bool = False, console: Console | None = None,
) -> JobResult:  # fmt: skip
    """Run a job to its end, from where earlier runs of it came to.

    Args:
        spec: from `load_job` or `JobSpec.parse`. overwrite: replace the output of an earlier job.
        replay: run the failed rows of a complete job again; they are missing from the table until they are done.
        address: Ray cluster; default: the Ray that this process is connected to, else one of its own on this machine.
        verbose: show Ray's own logs and progress. console: where to show progress; default: standard output.

    Returns:
        The figures. `status` is "complete" only if in = ok + failed holds by key; then the marker file is there.

    Raises:
        ConfigError: the job was refused; nothing was started.
    """
    console, times = console or Console(), _Times()
    plan = prepare(spec, overwrite=overwrite, replay=replay)
    if plan.marker is not None and plan.inputs is None:
        times.enter("end")
        return JobResult.of_marker(plan.marker, times.seconds)
    result = JobResult(output=bare_uri(spec.sink.uri), num_rows_in=plan.census.num_rows, seconds=times.seconds)
    result.key_column = plan.census.spec.id_column or KEY
    if plan.log is not None:
        plan.log.load()
        result.begin(plan.log)
    console.print(Text(_intro(plan), style="dim"))
    try:
        lease = Lease(plan.store)
        lease.check()
        with lease:
            log = _work(plan, result, times, console, (address, verbose))
            _finish(plan, log, result, times)
    except KeyboardInterrupt:
        result.status, result.reason = "interrupted", "stopped before all rows were done"
    except Exception as error:  # a lost node, a full disk, a bug: what was finished is told, and that it is not all
        if isinstance(error, ConfigError) and "start" not in times.seconds:
            raise  # the work had not begun
        if verbose:
            console.print_exception()
        result.reason = str(error) if isinstance(error, OutputTakenError) else _cause(error)
    gc.collect()  # the frames of a run that failed hold handles of its engines, which would keep their GPUs
    times.enter("end")
    return result


def _work(plan: Plan, result: JobResult, times: _Times, console: Console, cluster: tuple[Any, bool]) -> CommitLog:
    """Compute and commit what is missing; returns the log."""
    log = plan.log
    if log is not None and not (log.num_missing or plan.replay):
        return _take_over(plan, plan.overwrite)  # only the end of an earlier run is left to do
    with Progress(console, plan.census.num_rows, result.num_ok if plan.replay else result.num_rows_out) as progress:
        times.enter("start")
        progress.phase("starting Ray")
        with _ray(*cluster), _board(times) as (board, poll):
            progress.phase("loading the model", poll)
            checked = [_dataset(plan, board, log)]  # for the first round; refuses before anything is removed
            log = _take_over(plan, plan.overwrite)
            times.enter("load")
            if plan.replay:
                _take_failed_out(plan, log)
                checked.clear()
            result.begin(log)
            sink, table = plan.spec.sink, plan.table
            writes = RayWrites(PartWriter(plan.store, sink.file_format, plan.schema, log.part_prefix, log.num_replays))

            def committed(written: Written) -> None:
                times.enter("run")
                result.samples = (result.samples + written[1])[:NUM_SAMPLES]
                progress.num_written = log.done.count
                if table:
                    table.follow(log)

            def blocks() -> Generator[Block, None, None]:
                return finished_blocks(checked.pop() if checked else _dataset(plan, board, log))

            try:
                collect_all(blocks, log, writes, sink, committed)
            except KeyboardInterrupt:
                progress.phase("stopping: ending the engines and Ray", counters=False)
                if table:
                    table.follow(log, now=True)
                raise
            finally:
                result.count(log)
    return log


def _take_over(plan: Plan, overwrite: bool) -> CommitLog:
    """Become the only driver of the output, and remove what earlier ones left half done."""
    store, log = plan.store, plan.log
    if overwrite:
        nameless = [name for name in store.sizes() if name.startswith(PART_PREFIX) and not part_ids([name])]
        store.remove([MARKER, JOB, *nameless])
    job = claim_job(store, plan.spec, plan.fingerprint, plan.census)
    if log is None or log.job_id != job["id"]:
        log = CommitLog(store, job["id"], plan.census.num_rows)
        log.load()
    log.start()
    if plan.table:
        plan.table.sync(log, first=True)
    replaced = [name for name in store.sizes() if part_ids([name]) & set(job["replaces"])]
    store.remove([*log.garbage(), *replaced, *(f"{META}/log-{id}/" for id in job["replaces"]), f"{META}/tmp/"])
    return log


def _take_failed_out(plan: Plan, log: CommitLog) -> None:
    plan.store.remove([MARKER])
    if plan.table:
        plan.table.sync(log, without=log.failed())
    log.replay()


def _finish(plan: Plan, log: CommitLog, result: JobResult, times: _Times) -> None:
    """Check the equation; if it holds, say so in the log and write the marker."""
    times.enter("end")
    result.count(log)
    result.reason = check_equation(plan.census, log, plan.spec.sink.uri)
    if result.reason:
        return
    if plan.table:
        plan.table.sync(log)
    log.end()
    plan.store.remove(log.garbage())
    if (read_job(plan.store) or {}).get("id") != log.job_id:
        raise OutputTakenError("another driver has replaced this job with --overwrite")
    marker = {  # figures and parts; no row of the table is in it
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "log": [log.job_id, log.length],
        **{key: value for key, value in result.as_dict().items() if key not in ("samples", "reason")},
        "status": "complete",
        "versions": {"rayinfer": rayinfer.__version__, "ray": ray.__version__, "python": platform.python_version()},
        "parts": [{"name": name, "num_bytes": part.num_bytes} for name, part in sorted(log.parts.items())],
    }
    plan.store.put(MARKER, json.dumps(marker, indent=1).encode())
    result.status = "complete"  # not before: who is told so may look for the marker


def check_equation(census: Census, log: CommitLog, uri: str) -> str:
    """Return what is wrong with in = ok + failed, by row, by key and by file; empty when it holds."""
    if log.num_missing:
        return f"{log.num_missing:,} of {census.num_rows:,} rows are missing after {MAX_FRUITLESS_ROUNDS} more rounds"
    if log.digest() != census.key_digest():
        return f"{census.num_rows:,} rows came out, but their keys are not those that went in; give --overwrite"
    sizes = log.store.sizes()
    gone = sorted(name for name, part in log.parts.items() if sizes.get(name) != part.num_bytes)
    text = f"part(s) are no longer in {bare_uri(uri)!r} as they were written; start afresh with --overwrite"
    return f"{len(gone)} {text} (first: {gone[0]})" if gone else ""


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


@contextmanager
def _board(times: _Times) -> Iterator[tuple[Any, Callable[[], Mapping[str, Any] | None]]]:
    """The actor that engines report to, and what asks it from the display's thread until the job is over."""
    actor: Any = StatsBoard.remote()  # type: ignore[attr-defined]
    lock, over = threading.Lock(), False  # no call may be under way when Ray is shut down

    def poll() -> Mapping[str, Any] | None:
        with lock:
            try:
                stats = None if over else ray.get(actor.snapshot.remote(), timeout=2)
            except ray.exceptions.RayError:  # late or lost: the display shows what it had
                return None
        if stats and stats["num_engines"]:
            times.enter("run")
        return stats

    try:
        yield actor, poll
    finally:
        with lock:
            over = True


@contextmanager
def _ray(address: str | None, verbose: bool) -> Iterator[None]:
    """Ray for one job: quiet unless `verbose`, and gone afterwards if it was started here."""
    started = not ray.is_initialized()
    if started:
        handler = signal.getsignal(signal.SIGTERM)
        with nullcontext() if verbose else _hushed_core():
            ray.init(
                address=address or "local", include_dashboard=None if address else False, log_to_driver=verbose,
                logging_level=logging.INFO if verbose else logging.CRITICAL,
                # Ray's own 15 lets an engine on a CPU starve beside any two busy processes: 10 rows in 9 minutes.
                _system_config=None if address else {"worker_niceness": 0},
            )  # fmt: skip
        if handler is not None and threading.current_thread() is threading.main_thread():  # ray.init put its own there
            signal.signal(signal.SIGTERM, handler)
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


def _dataset(plan: Plan, board: Any, log: CommitLog | None) -> ray.data.Dataset:
    """What is to be done for the rows that the log lacks, as a lazy dataset of finished rows."""
    spec = plan.spec
    config = EngineProcessorConfig(
        model_source=spec.model.model, engine_kwargs=spec.model.model_dump(exclude_unset=True, exclude={"model"}),
        sampling_params=spec.sampling, on_error=spec.on_error, **spec.processor.model_dump(exclude_none=True),
    )  # fmt: skip
    # any_rows: the rows that Ray doubles or loses for it are found by number.
    processor = Processor(config, RenderPrompt(spec.template()), stats_actor=board, any_rows=True, inputs=plan.inputs)
    units = plan.census.units_left(log.done) if log and log.num_missing else plan.census.units
    return processor(plan.census.dataset(units))


def _intro(plan: Plan) -> str:
    census = plan.census
    left_out = f", {census.num_skipped_files} left out" if census.num_skipped_files else ""
    files = f"{census.num_files:,} file{'s' * (census.num_files != 1)}"
    source = f"{census.num_rows:,} rows from {files} ({census.format}{left_out})"
    done = f"\ngoing on: {plan.log.done.count:,} rows are done" if plan.log and plan.log.done.count else ""
    done += f", {plan.marker['num_failed']:,} of them failed: these run again" if plan.replay and plan.marker else ""
    return f"{source}: {bare_uri(census.spec.uri)}\nmodel: {plan.spec.model.model}{done}"


def _cause(error: BaseException) -> str:
    """The innermost cause of a failed Ray task, without Ray's frames."""
    while isinstance(inner := getattr(error, "cause", None) or error.__cause__, BaseException):
        error = inner
    text = bare_uri(str(error).strip() or repr(error)).partition("\nFailed to apply UDF")[0]  # what follows is Ray's
    if isinstance(error, RowError):
        text += "; on_error: record keeps such a row as failed; or change the row or the job, and give --overwrite"
    return text if isinstance(error, ConfigError | RowError) else f"{type(error).__name__}: {text.splitlines()[-1]}"
