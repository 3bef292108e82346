"""From finished blocks to commits: groups of blocks are written as parts by tasks, and the driver commits the parts.

Ray may lose blocks, give rows twice, or group them otherwise when it runs tasks again. None of it reaches the table: a
part with rows that are done is written again without them, and the caller computes missing rows in another round.
"""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import ray

from rayinfer.pipelines.job import SinkSpec
from rayinfer.pipelines.keys import unpack_rows
from rayinfer.pipelines.log import CommitLog, Part
from rayinfer.pipelines.sinks import PartWriter

MAX_FRUITLESS_ROUNDS = 3
MAX_WRITES = 4  # write tasks at once
PART_BYTES = 256 * 2**20  # of the rows in memory: a writer holds a part several times over
DRAIN_SECONDS = 10.0  # what a job that is stopped may take to commit what is finished
_POLL_SECONDS = 0.1

Block = tuple[Any, int, int]  # reference, rows, bytes
Written = tuple[list[Part], list[dict[str, Any]]]


class Writes(Protocol):
    """Write tasks: `start` returns a handle, `ended` those that have ended, `result` what one came to (None: lost)."""

    def start(self, only: np.ndarray | None, blocks: list[Any]) -> Any: ...

    def ended(self, handles: list[Any], seconds: float) -> list[Any]: ...

    def result(self, handle: Any) -> Written | None: ...


class RayWrites:
    """Write tasks on the cluster, where the blocks are. They hold no CPU: the engines may have all."""

    def __init__(self, writer: PartWriter):
        self._writer = ray.put(writer)
        options: Any = {"num_cpus": 0, "max_retries": 3, "retry_exceptions": [OSError]}
        self._task: Any = ray.remote(**options)(_write)

    def start(self, only: np.ndarray | None, blocks: list[Any]) -> Any:
        return self._task.remote(self._writer, only, *blocks)

    def ended(self, handles: list[Any], seconds: float) -> list[Any]:
        return ray.wait(handles, num_returns=len(handles), timeout=seconds, fetch_local=False)[0]

    def result(self, handle: Any) -> Written | None:
        try:
            return ray.get(handle)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ray.exceptions.RayError):  # a block was lost with its node
                return None
            raise
        except ray.exceptions.RayError:
            return None


def _write(writer: PartWriter, only: np.ndarray | None, *blocks: Any) -> Written:
    return writer(only, *blocks)


def collect_all(
    blocks: Callable[[], Iterator[Block]],
    log: CommitLog,
    writes: Writes,
    sink: SinkSpec,
    committed: Callable[[Written], None],
) -> None:
    """Commit until no row is missing or some rounds brought none; `blocks` begins a round over the missing rows."""
    fruitless = 0
    while log.num_missing and fruitless < MAX_FRUITLESS_ROUNDS:
        before = log.done.count
        collect(blocks(), log, writes, sink, committed)
        fruitless = 0 if log.done.count > before else fruitless + 1


def collect(
    blocks: Iterator[Block], log: CommitLog, writes: Writes, sink: SinkSpec, committed: Callable[[Written], None]
) -> None:
    """Commit the rows of blocks until these end; what was finished is committed also when it is stopped or fails.

    Args:
        blocks: read in a thread of its own. committed: called after each commit.

    Raises:
        OutputTakenError: another driver appended to the log. Exception: what `blocks` or a write raised.
    """
    running: dict[Any, list[Any]] = {}  # write task -> its blocks, kept until they are committed
    group: list[Block] = []
    oldest = 0.0

    def flush() -> None:
        if group:
            references = [block[0] for block in group]
            running[writes.start(None, references)] = references
            group.clear()

    def settle(seconds: float) -> None:
        for handle in writes.ended(list(running), seconds) if running else ():
            references, written = running.pop(handle), writes.result(handle)
            if written is None or not written[0]:
                continue
            rows = np.concatenate([unpack_rows(part.rows) for part in written[0]])
            fresh = rows[~log.done.has(rows)]
            if len(fresh) == len(rows):
                log.commit(written[0])
                committed(written)
            elif len(fresh):
                running[writes.start(fresh, references)] = references

    with _Pump(blocks) as pump:
        try:
            ended = False
            while not ended or group or running:
                if not ended and len(running) < MAX_WRITES:
                    block = pump.get(_POLL_SECONDS)
                    if block is None:
                        ended = pump.ended
                    else:
                        oldest = oldest if group else time.monotonic()
                        group.append(block)
                full = sum(b[1] for b in group) >= sink.rows_per_part or sum(b[2] for b in group) >= PART_BYTES
                if ended or full or time.monotonic() - oldest >= sink.flush_seconds:
                    flush()
                settle(_POLL_SECONDS if ended or len(running) >= MAX_WRITES else 0.0)
        except _Stopped as stopped:
            _drain(flush, settle, running)
            raise stopped.__cause__ or stopped from None
        except KeyboardInterrupt:
            _drain(flush, settle, running)
            raise


def _drain(flush: Callable[[], None], settle: Callable[[float], None], running: dict[Any, Any]) -> None:
    flush()
    deadline = time.monotonic() + DRAIN_SECONDS
    while running and time.monotonic() < deadline:
        settle(_POLL_SECONDS)


class _Stopped(Exception):  # noqa: N818  # the blocks did; the cause says why
    pass


class _Pump:
    """Iterates in a thread, at most a few blocks ahead, so that time can pass while no block comes."""

    def __init__(self, blocks: Iterator[Block]):
        self.ended = False
        self._blocks = blocks
        self._queue: queue.Queue[Block | BaseException | None] = queue.Queue(2 * MAX_WRITES)
        self._stop = False
        self._thread = threading.Thread(target=self._run, name="rayinfer-blocks", daemon=True)

    def __enter__(self) -> _Pump:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """End the iteration where it is: Ray then stops the dataset's tasks and actors."""
        self._stop = True
        for _ in range(10):
            if self._thread.ident is None or not self._thread.is_alive():
                return
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread.ident), ctypes.py_object(SystemExit))
            self._thread.join(timeout=1)

    def get(self, seconds: float) -> Block | None:
        """The next block; None if none came, or all have come (`ended`). Raises _Stopped."""
        try:
            item = self._queue.get(timeout=seconds)
        except queue.Empty:
            return None
        self.ended = item is None
        if isinstance(item, BaseException):
            raise _Stopped from item
        return item

    def _run(self) -> None:
        try:
            for block in self._blocks:
                self._put(block)
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: Block | BaseException | None) -> None:
        while not self._stop:
            try:
                return self._queue.put(item, timeout=1)
            except queue.Full:
                continue
