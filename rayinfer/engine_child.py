"""The process that holds an engine: rows come in through one pipe, outputs leave through another.

Its parent (`engine_process.EngineProcess`) is told which rows are about to run before they do, so that it knows whom to
suspect when this process dies, and hears from it after each step, so that it notices when it stands still.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TYPE_CHECKING

from rayinfer.errors import RowError
from rayinfer.request import EncodedRow, EngineStats, RequestOutput, failed_output
from rayinfer.sampling import SamplingParams
from rayinfer.start import start_engine

if TYPE_CHECKING:
    from rayinfer.engine import Engine

_Inbox = SimpleQueue[list[tuple[str, EncodedRow]]]

HEARTBEAT_S = 0.2
_PR_SET_PDEATHSIG = 1


def main(read_fd: int, write_fd: int, dump_fd: int, parent_pid: int) -> None:
    """Serve until the parent closes the pipe. Stacks of a crash go to `dump_fd`."""
    faulthandler.enable(dump_fd)  # also what the parent sends to an engine that hangs: SIGABRT
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    _die_with(parent_pid)
    outbox = Connection(write_fd, readable=False)
    try:
        _serve(Connection(read_fd, writable=False), outbox)
    except BaseException as error:
        outbox.send(("died", f"{type(error).__name__}: {error}"[:500]))
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _serve(pipe: Connection, outbox: Connection) -> None:
    try:
        engine = start_engine(pipe.recv())
    except ValueError as error:  # ConfigError: the user's to change
        outbox.send(("refused", error))
        return
    outbox.send(("loaded", None))
    _prove(engine)
    engine.on_admit = lambda ids: outbox.send(("admitted", ids))
    outbox.send(("ready", None))
    inbox: _Inbox = SimpleQueue()
    threading.Thread(target=_read, args=(pipe, inbox), name="rayinfer-inbox", daemon=True).start()
    told = 0.0
    while True:
        finished: list[RequestOutput] = []
        for request_id, row in _take(inbox, wait=not engine.has_work):
            try:
                engine.add(request_id, row)
            except RowError as error:
                finished.append(failed_output(row, error, request_id))
        if engine.has_work:
            finished += engine.step()
        now = time.monotonic()
        if finished or not engine.has_work or now - told > HEARTBEAT_S:
            for output in finished:
                output.prompt, output.prompt_token_ids = None, []  # the parent has them
            outbox.send(("stepped", (finished, engine.snapshot())))
            told = now


def _prove(engine: Engine) -> None:
    """Run a row of one token: an engine that cannot do this is not to be blamed on the rows that it dies with."""
    engine.add("", EncodedRow([0], SamplingParams(temperature=0, max_tokens=1)))
    while engine.has_work:
        engine.step()
    engine.pool.reset_prefix_cache()
    engine.stats = EngineStats()


def _read(pipe: Connection, inbox: _Inbox) -> None:
    """Rows from the parent, read in a thread so that a full pipe never holds the parent up."""
    try:
        while True:
            inbox.put(pipe.recv())
    except (EOFError, OSError):  # closed, or the parent died: nobody waits for what is left
        os._exit(0)


def _take(inbox: _Inbox, wait: bool) -> list[tuple[str, EncodedRow]]:
    """All rows that have come; waits for some if there is nothing else to do."""
    rows = inbox.get() if wait else []
    while not inbox.empty():
        rows += inbox.get()
    return rows


def _die_with(parent_pid: int) -> None:
    """Have Linux kill this process when its parent ends, even if no thread of it can run; elsewhere the pipe tells."""
    if (prctl := getattr(ctypes.CDLL(None), "prctl", None)) is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:
            os._exit(0)
