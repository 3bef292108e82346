"""From finished blocks to commits: groups of blocks are written as parts by tasks, and the driver commits the parts.

Ray may lose blocks, give rows twice, or group them otherwise when it runs tasks again. None of it reaches the table: a
part with rows that are done is written again without them, and missing rows are computed in another round.
"""

import contextlib
import ctypes
import logging
import queue
import threading
import time
from collections.abc import Callable, Generator
from typing import Any, Self

import numpy as np
import ray

from rayinfer.pipelines.job import SinkSpec
from rayinfer.pipelines.keys import unpack_rows
from rayinfer.pipelines.log import CommitLog, Part
from rayinfer.pipelines.sinks import PartWriter
from rayinfer.processors.ray_compat import ending_nodes

logger = logging.getLogger(__name__)

MAX_FRUITLESS_ROUNDS = 3
MAX_WRITES = 4  # write tasks at once
PART_BYTES = 256 * 2**20  # of the rows in memory: a writer holds a part several times over
DRAIN_SECONDS = 10.0  # what a job that is stopped may take to commit what is finished
LAST_SECONDS = 5.0  # between two flushes while a node that may hold blocks is about to end
STALL_SECONDS = 60.0  # without news, on a cluster that has shrunk
_POLL_SECONDS = 0.1

Block = tuple[Any, int, int]  # reference, rows, bytes
Written = tuple[list[Part], list[dict[str, Any]]]  # parts, and a few rows to look at


class RayWrites:
    """Write tasks on the cluster, where the blocks are. They hold no CPU: the engines may have all."""

    def __init__(self, writer: PartWriter):
        options: Any = {"num_cpus": 0, "max_retries": 3, "retry_exceptions": [OSError]}
        self._writer, self._task = ray.put(writer), ray.remote(**options)(PartWriter.__call__)
        self._hurry, self._asked = False, 0.0

    def start(self, only: np.ndarray | None, blocks: list[Any]) -> Any:
        """Begin a PartWriter's call; returns its handle."""
        return self._task.remote(self._writer, only, *blocks)

    def ended(self, handles: list[Any], seconds: float) -> list[Any]:
        """Those of the calls that have ended, waiting so long for it."""
        return ray.wait(handles, num_returns=len(handles), timeout=seconds, fetch_local=False)[0]

    def result(self, handle: Any) -> Written | None:
        """What a call that has ended came to; None if a block or the worker was lost."""
        try:
            return ray.get(handle)
        except ray.exceptions.RayError as error:
            if isinstance(error, ray.exceptions.RayTaskError) and not isinstance(error.cause, ray.exceptions.RayError):
                raise
            return None

    def hurry(self) -> bool:
        """Whether a node is about to end, and blocks with it. They would be computed again."""
        if time.monotonic() - self._asked > LAST_SECONDS / 2:
            self._hurry, self._asked = bool(ending_nodes()), time.monotonic()
        return self._hurry

    def resources(self) -> dict[str, float]:
        """CPUs and GPUs of the nodes that live."""
        return ray.cluster_resources()


def collect_all(
    blocks: Callable[[], Generator[Block, None, None]], log: CommitLog, writes: RayWrites, sink: SinkSpec,
    committed: Callable[[Written], None],
) -> None:  # fmt: skip
    """Commit until no row is missing or some rounds brought none; what is finished is committed also when it fails.

    Args:
        blocks: begins a round over the missing rows; read in a thread. committed: called after each commit.

    Raises:
        OutputTakenError: another driver appended to the log. Exception: what `blocks` or a write raised.
    """
    fruitless = 0
    while log.num_missing and fruitless < MAX_FRUITLESS_ROUNDS:
        before = log.done.count
        _Round(log, writes, sink, committed).run(blocks())
        fruitless = 0 if log.done.count > before else fruitless + 1


class _Round:
    def __init__(self, log: CommitLog, writes: RayWrites, sink: SinkSpec, committed: Callable[[Written], None]):
        self.log, self.writes, self.sink, self.committed = log, writes, sink, committed
        self.group: list[Any] = []  # references of the blocks that are to be a part
        self.num_rows = self.num_bytes = 0  # of the group
        self.oldest = 0.0  # when the group's first block came
        self.running: dict[Any, list[Any]] = {}  # write task -> its blocks, kept until they are committed
        self.resources, self.news = writes.resources(), time.monotonic()  # in the beginning; when something last came

    def run(self, blocks: Generator[Block, None, None]) -> None:
        stop: BaseException | None = None
        with _Pump(blocks) as pump:
            try:
                while not pump.ended or self.group or self.running:
                    if not pump.ended and len(self.running) < MAX_WRITES and (block := pump.get(_POLL_SECONDS)):
                        self._gather(*block)
                    if pump.ended or self._is_due():
                        self._flush()
                    self._settle(_POLL_SECONDS if pump.ended or len(self.running) >= MAX_WRITES else 0.0)
                    self._check_stall()
            except (KeyboardInterrupt, _Ended) as error:
                stop = error.__cause__ or error
                self._flush()
                deadline = time.monotonic() + DRAIN_SECONDS
                while self.running and time.monotonic() < deadline:
                    self._settle(_POLL_SECONDS)
        if stop is not None and not isinstance(stop, _Ended):
            raise stop

    def _check_stall(self) -> None:
        """End the round if nodes were lost and nothing comes any more: the next one is planned for those that are left.

        The actors of a round, started again on fewer nodes, can hold all CPUs that are left. Tasks that would compute
        lost blocks again then wait for ever (seen when two of three nodes died).
        """
        if time.monotonic() - self.news < STALL_SECONDS:
            return
        self.news, now = time.monotonic(), self.writes.resources()
        if any(now.get(name, 0) < self.resources.get(name, 0) for name in ("CPU", "GPU")):
            logger.warning("nodes were lost and no row came for %.0f s: beginning again with the others", STALL_SECONDS)
            raise _Ended

    def _gather(self, reference: Any, num_rows: int, num_bytes: int) -> None:
        self.news = time.monotonic()
        self.oldest = self.oldest if self.group else self.news
        self.group.append(reference)
        self.num_rows, self.num_bytes = self.num_rows + num_rows, self.num_bytes + num_bytes

    def _is_due(self) -> bool:
        waited = time.monotonic() - self.oldest
        late = waited >= self.sink.flush_seconds or (waited >= LAST_SECONDS and self.writes.hurry())
        return self.num_rows >= self.sink.rows_per_part or self.num_bytes >= PART_BYTES or late

    def _flush(self) -> None:
        if self.group:
            self.running[self.writes.start(None, self.group)] = self.group
            self.group, self.num_rows, self.num_bytes = [], 0, 0

    def _settle(self, seconds: float) -> None:
        """Commit what the tasks that have ended wrote."""
        for handle in self.writes.ended(list(self.running), seconds) if self.running else ():
            self.news = time.monotonic()
            references, written = self.running.pop(handle), self.writes.result(handle)
            if written is None or not written[0]:
                continue
            rows = np.concatenate([unpack_rows(part.rows) for part in written[0]])
            fresh = rows[~self.log.done.has(rows)]
            if len(fresh) == len(rows):
                self.log.commit(written[0])
                self.committed(written)
            elif len(fresh):
                self.running[self.writes.start(fresh, references)] = references


class _Ended(Exception):  # noqa: N818
    """The round is over: the blocks failed, and the cause says why; or it stood still."""


class _Pump:
    """Iterates in a thread, a few blocks ahead, so that time can pass while no block comes."""

    def __init__(self, blocks: Generator[Block, None, None]):
        self.ended, self._blocks, self._stop = False, blocks, False
        self._queue: queue.Queue[Block | BaseException | None] = queue.Queue(2 * MAX_WRITES)
        self._thread = threading.Thread(target=self._run, name="rayinfer-blocks", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """End the iteration where it is: Ray then stops the dataset's tasks and actors."""
        self._stop = True
        if self._thread.is_alive():  # else its number may be another thread's by now
            thread = ctypes.c_ulong(self._thread.ident or 0)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(SystemExit))
            self._thread.join(timeout=DRAIN_SECONDS)

    def get(self, seconds: float) -> Block | None:
        """The next block; None if none came in time, or all have come (`ended`). Raises _Ended."""
        try:
            item = self._queue.get(timeout=seconds)
        except queue.Empty:
            return None
        self.ended = item is None
        if isinstance(item, BaseException):
            raise _Ended from item
        return item

    def _run(self) -> None:
        try:
            for block in self._blocks:
                self._put(block)
            self._put(None)
        except BaseException as error:
            self._put(error)
        finally:
            self._blocks.close()

    def _put(self, item: Block | BaseException | None) -> None:
        while not self._stop:
            with contextlib.suppress(queue.Full):
                return self._queue.put(item, timeout=1)
