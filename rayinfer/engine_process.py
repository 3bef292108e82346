"""An engine in a process of its own, fed by many callers: their rows share one running batch.

The process is replaced when it dies or hangs, and the rows that it had are run again. A row that kills it each time is
found by halving those that ran when it died: after at most 2 + log2(rows) starts it alone is an ENGINE_CRASH.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Container, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields
from itertools import count
from multiprocessing import Pipe
from typing import Any

from rayinfer.config import EngineConfig
from rayinfer.errors import ErrorType, RowError
from rayinfer.host import free_memory
from rayinfer.request import EncodedRow, EngineStats, RequestOutput, failed_output

logger = logging.getLogger(__name__)

OnFinished = Callable[[int, RequestOutput], None]

START_S = 1800.0  # of a process: a large model from slow storage
FIRST_STEP_S = 600.0  # of a process, which may compile kernels
MIN_STEP_S = 60.0  # no step is given less than this, or than ten times the longest before it
POLL_S = 1.0
END_S = 10.0  # for a process to end by itself
MAX_FAILED_STARTS = 3  # one after the other
MIN_FREE_MEMORY = 0.05  # of the machine's, or the container's; while less is free, the engine gets ever fewer rows
MEMORY_S = 10.0  # between two looks
# Turns for which a thread of libgomp (torch's on a CPU) waits busily for the others. Its own 300,000 are longer than a
# time slice: beside another program that keeps the cores busy, threads that wait kept those that work from running.
SPINS = "10000"
_NO_LIMIT = 2**30
_GAUGES = ("num_running", "num_waiting", "kv_usage")


@dataclass(slots=True)
class _Row:
    """A row that has no result yet."""

    row: EncodedRow
    index: int
    on_finished: OnFinished
    num_crashes: int = 0


class EngineProcess:
    """Owns an engine's process; all methods may be called from any thread.

    Raises:
        ConfigError: as Engine does. RuntimeError: the process died each time that it started.
    """

    def __init__(self, config: EngineConfig):
        self.error: BaseException | None = None
        self._config, self.id = config, uuid.uuid4().hex
        self._lock = threading.RLock()
        self._rows: dict[str, _Row] = {}  # all that are not finished, oldest first
        self._unsent: dict[str, None] = {}  # of these: not in the process
        self._admitted: set[str] = set()  # of those that are: running
        self._suspects = _Suspects()
        self._limit, self._looked = _NO_LIMIT, 0.0
        self._child: _Child | None = None
        self._closed = False
        self._lost, self._stats = EngineStats(), EngineStats()  # of processes that died (no gauges), and of this one
        self._ids = count()
        ready: Future[None] = Future()
        # One thread for all its processes: Linux ends a child with the thread that started it.
        self._thread = threading.Thread(target=self._run, args=(ready,), name="rayinfer-engine", daemon=True)
        self._thread.start()
        ready.result()

    def submit(self, rows: Sequence[EncodedRow], on_finished: OnFinished) -> None:
        """Queue rows; `on_finished(index in rows, output)` is called on the engine's thread as each one ends.

        Raises:
            RuntimeError: the engine cannot be started any more (the cause is chained) or was closed.
        """
        with self._lock:
            if self._closed or self.error is not None:
                raise RuntimeError("the engine is closed" if self._closed else "the engine died") from self.error
            new = {str(next(self._ids)): _Row(row, index, on_finished) for index, row in enumerate(rows)}
            self._rows |= new
            self._unsent |= dict.fromkeys(new)
            self._feed()

    def stats(self) -> EngineStats:
        """Counts as of the last step; rows not yet taken by the engine count as waiting."""
        with self._lock:
            old, new = self._lost, self._stats
            sums = {f.name: getattr(new, f.name) + getattr(old, f.name) * (f.name not in _GAUGES) for f in fields(new)}
            sums["num_waiting"] = max(0, len(self._rows) - new.num_running)
            return EngineStats(**sums)

    def close(self) -> None:
        """End the process; rows that are not done end as ABORTED."""
        with self._lock:
            self._closed = True
            if self._child is not None:
                self._child.end()
        self._thread.join()

    def _run(self, ready: Future[None]) -> None:
        num_failed = 0
        try:
            while not self._closed:
                child = _Child(self._config)
                try:
                    if started := child.wait_until_ready(lambda: self._closed):
                        self._serve(child, ready)
                finally:
                    child.end()
                if self._closed:
                    break
                num_failed = 0 if started else num_failed + 1
                if num_failed == MAX_FAILED_STARTS:
                    raise RuntimeError(f"the engine's process died while it started: {child.reason}")
                self._died(child)
        except BaseException as error:
            self.error = error
            if not ready.done():
                ready.set_exception(error)
        finally:
            self._abort_all()

    def _serve(self, child: _Child, ready: Future[None]) -> None:
        """Feed a process and take its results until it ends."""
        with self._lock:
            if self._closed:  # it was while the process started: nobody else ends it
                return
            self._child = child
            self._feed()
        if not ready.done():
            ready.set_result(None)
        while (message := child.receive(lambda: len(self._rows) > len(self._unsent))) is not None:
            kind, payload = message
            if kind == "admitted":
                self._admitted.update(payload)
            elif kind == "stepped":
                self._finish(*payload)

    def _finish(self, outputs: Sequence[RequestOutput], stats: EngineStats) -> None:
        with self._lock:
            self._stats = stats
            done = [(self._rows.pop(output.request_id), output) for output in outputs]
            self._admitted.difference_update(output.request_id for output in outputs)
            self._feed()
        for row, output in done:
            output.prompt, output.prompt_token_ids = row.row.prompt, row.row.prompt_token_ids
            output.num_restarts = row.num_crashes
            row.on_finished(row.index, output)

    def _feed(self) -> None:
        """Send the process the rows that it may have now. The lock is held."""
        num_sent = len(self._rows) - len(self._unsent)
        if self._child is None or self._closed or (self._suspects.trying and num_sent):
            return
        ids = self._suspects.next_trial(self._rows) or list(self._unsent)[: max(0, self._room(num_sent))]
        for request_id in ids:
            del self._unsent[request_id]
        if ids:
            self._child.send([(request_id, self._rows[request_id].row) for request_id in ids])

    def _room(self, num_sent: int) -> int:
        """Rows that the process may get, by the memory that the machine has left."""
        now = time.monotonic()
        if now - self._looked > MEMORY_S:
            self._looked, (free, total) = now, free_memory()
            short = free < MIN_FREE_MEMORY * total
            self._limit = max(1, min(self._limit, num_sent) // 2) if short else min(2 * self._limit, _NO_LIMIT)
            if short:
                logger.warning("memory is %.0f %% full: at most %d rows at once", 100 * (1 - free / total), self._limit)
        return self._limit - num_sent

    def _died(self, child: _Child) -> None:
        """Queue the rows of a process that died, and decide which of them to suspect."""
        with self._lock:
            sent = [request_id for request_id in self._rows if request_id not in self._unsent]
            ran = [request_id for request_id in sent if request_id in self._admitted] or sent
            logger.error("the engine is replaced, %d rows ran in it: %s\n%s", len(ran), child.reason, child.stacks)
            self._child, self._lost, self._stats = None, self.stats(), EngineStats()
            self._unsent = dict.fromkeys(self._rows)
            self._admitted.clear()
            for request_id in ran:
                self._rows[request_id].num_crashes += 1
            again = [request_id for request_id in ran if self._rows[request_id].num_crashes > 1]
            if (guilty := self._suspects.crashed(again, sent)) is None:
                return
            row, times = self._rows[guilty].row, self._rows[guilty].num_crashes
            # Greedy rows that are equal do the same: each would have to be found anew.
            ids = [key for key, other in self._rows.items() if row.params.temperature == 0 and other.row == row]
            failed = [self._rows.pop(request_id) for request_id in ids or [guilty]]
            self._unsent = dict.fromkeys(self._rows)
        message = f"the engine died {times} times while it ran this row, at last alone: {child.reason}"
        for one in failed:
            output = failed_output(one.row, RowError(ErrorType.ENGINE_CRASH, message))
            output.num_restarts = max(0, one.num_crashes - 1)
            one.on_finished(one.index, output)

    def _abort_all(self) -> None:
        with self._lock:
            left, self._rows, self._unsent = self._rows, {}, {}
        reason = f"the engine died: {self.error!r}" if self.error is not None else "the engine was closed"
        for row in left.values():
            row.on_finished(row.index, failed_output(None, RowError(ErrorType.ABORTED, reason)))


class _Suspects:
    """Rows that ran when a process died the second time, tried alone in ever smaller groups."""

    def __init__(self) -> None:
        self.trying = False  # the rows in the process are suspects
        self._groups: list[tuple[list[str], bool]] = []  # a stack; True: the group is known to hold a guilty row

    def next_trial(self, unfinished: Container[str]) -> list[str]:
        """The group to run next, alone; empty when no row is suspected."""
        self.trying = True
        while self._groups:
            ids, sure = self._groups.pop()
            ids = [request_id for request_id in ids if request_id in unfinished]
            if sure and len(ids) > 1:  # it would die: on to its halves. If the first one lives, it is the second one.
                half = len(ids) // 2
                self._groups += [(ids[half:], True), (ids[:half], False)]
            elif ids:
                return ids
        self.trying = False
        return []

    def crashed(self, ran: list[str], sent: list[str]) -> str | None:
        """Take note of a death; returns the row that it is down to, if it is.

        Args:
            ran: rows that ran, and not for the first time. sent: those that were in the process, in a trial.
        """
        tried, self.trying = self.trying, False
        if tried:
            if self._groups:
                self._groups[-1] = (self._groups[-1][0], False)  # it was the first half, so maybe not the second
            self._groups.append(([request_id for request_id in sent if request_id not in ran], False))
            if len(ran) == 1:
                return ran[0]
        self._groups.append((ran, True))
        return None


class _Child:
    """One process, and the pipes to it and from it."""

    def __init__(self, config: EngineConfig):
        self.reason = ""  # why it ended
        self._longest: float | None = None  # seconds until a step ended
        (self._inbox, its_outbox), (its_inbox, self._outbox) = Pipe(duplex=False), Pipe(duplex=False)
        self._dump = tempfile.TemporaryFile()  # noqa: SIM115  # it is gone with this object
        fds = its_inbox.fileno(), its_outbox.fileno(), self._dump.fileno()
        path = [folder or os.getcwd() for folder in sys.path]
        code = f"import sys; sys.path[:] = {path!r}; from rayinfer.engine_child import main; main{(*fds, os.getpid())}"
        # A count goes before the policy that a user may have chosen.
        env = os.environ if "OMP_WAIT_POLICY" in os.environ else {"GOMP_SPINCOUNT": SPINS, **os.environ}
        self._process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL, pass_fds=fds, env=env)
        its_inbox.close()
        its_outbox.close()
        self.send(config)

    @property
    def stacks(self) -> str:
        """Of its threads when it was ended by a signal that can be caught."""
        self._dump.seek(0)
        return self._dump.read().decode(errors="replace")

    def send(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # it is dead; `receive` tells
            self._outbox.send(message)

    def wait_until_ready(self, stop: Callable[[], bool]) -> bool:
        """False if it died before, or was to stop. Raises ConfigError as Engine does."""
        deadline = time.monotonic() + START_S
        try:
            while not stop():
                if time.monotonic() > deadline:
                    self._hung("it hung: it did not start, or its first step did not end, in time")
                    return False
                if self._inbox.poll(POLL_S):
                    kind, payload = self._inbox.recv()
                    if kind == "refused":
                        raise payload
                    self.reason = payload or ""
                    if kind == "ready":
                        return True
                    deadline = time.monotonic() + FIRST_STEP_S  # it is loaded, and proves that it can run a row
        except (EOFError, OSError):
            self._ended()
        return False

    def receive(self, busy: Callable[[], bool]) -> tuple[str, Any] | None:
        """Its next word; None when it has ended. One that has rows and says nothing for too long is ended here."""
        since = time.monotonic()
        while True:
            try:
                if self._inbox.poll(POLL_S):
                    message: tuple[str, Any] = self._inbox.recv()
                    if message[0] == "died":
                        self.reason = message[1]
                        continue
                    if message[0] == "stepped":
                        self._longest = max(self._longest or 0.0, time.monotonic() - since)
                    return message
            except (EOFError, OSError):
                self._ended()
                return None
            silent = time.monotonic() - since
            if not busy():
                since = time.monotonic()
            elif silent > (FIRST_STEP_S if self._longest is None else max(MIN_STEP_S, 10 * self._longest)):
                self._hung(f"it hung: no step ended for {silent:.0f} s")
                return None

    def end(self) -> None:
        """End it, whatever it does."""
        self._outbox.close()
        self._ended()

    def _hung(self, reason: str) -> None:
        self.reason = reason
        self._process.send_signal(signal.SIGABRT)  # it writes its stacks down
        self._ended()

    def _ended(self) -> None:
        try:
            code = self._process.wait(timeout=END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        self.reason = self.reason or f"its process ended with {name}"
