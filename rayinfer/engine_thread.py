"""An engine in a thread of its own, fed by many callers: their rows share one running batch."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from itertools import count

from rayinfer.config import EngineConfig
from rayinfer.engine import Engine, EngineStats
from rayinfer.errors import ErrorType, RowError
from rayinfer.inputs import EncodedRow
from rayinfer.request import CompletionOutput, RequestOutput

OnFinished = Callable[[int, RequestOutput], None]


class EngineThread:
    """Owns an Engine; all methods may be called from any thread.

    The engine is built by its own thread: had another one used torch on a CPU before, OpenMP would count the threads of
    both, find them more than the cores, and let them sleep at every barrier where it let them spin.

    Raises:
        ConfigError: as Engine does.
    """

    engine: Engine

    def __init__(self, config: EngineConfig):
        self.error: BaseException | None = None
        self._inbox: deque[tuple[str, EncodedRow, int, OnFinished]] = deque()
        self._waiters: dict[str, tuple[int, OnFinished]] = {}
        self._wake = threading.Condition()
        self._closed = False
        self._stats = EngineStats()
        self._ids = count()
        built: Future[Engine] = Future()
        self._thread = threading.Thread(target=self._run, args=(config, built), name="rayinfer-engine", daemon=True)
        self._thread.start()
        self.engine = built.result()

    def submit(self, rows: Sequence[EncodedRow], on_finished: OnFinished) -> None:
        """Queue rows; `on_finished(index in rows, output)` is called on the engine's thread as each one ends.

        Raises:
            RuntimeError: the engine has died (the cause is chained) or was closed.
        """
        with self._wake:
            if self._closed or self.error is not None:
                raise RuntimeError("the engine is closed" if self._closed else "the engine died") from self.error
            self._inbox.extend((str(next(self._ids)), row, index, on_finished) for index, row in enumerate(rows))
            self._wake.notify()

    def stats(self) -> EngineStats:
        """Counts as of the last step; rows not yet taken by the engine count as waiting."""
        with self._wake:
            return replace(self._stats, num_waiting=self._stats.num_waiting + len(self._inbox))

    def close(self) -> None:
        """Stop after the step in hand; rows that are not done end as ABORTED."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _run(self, config: EngineConfig, built: Future[Engine]) -> None:
        try:
            self.engine = Engine(config)
        except BaseException as error:
            built.set_exception(error)
            return
        built.set_result(self.engine)
        try:
            while self._take_in():
                for output in self.engine.step():
                    index, on_finished = self._waiters.pop(output.request_id)
                    on_finished(index, output)
                snapshot = replace(self.engine.snapshot())
                with self._wake:
                    self._stats = snapshot
        except BaseException as error:
            self.error = error
            raise
        finally:
            self._abort_all()

    def _take_in(self) -> bool:
        """Wait for work and move the inbox into the engine; False when closed."""
        with self._wake:
            while not (self._closed or self._inbox or self.engine.has_work):
                self._wake.wait()
            if self._closed:
                return False
            taken = list(self._inbox)
            self._inbox.clear()
        # All of them first: should the engine die on one, the rows behind it must be called back too.
        self._waiters.update((request_id, (index, on_finished)) for request_id, _, index, on_finished in taken)
        for request_id, row, index, on_finished in taken:
            try:
                self.engine.add(request_id, row)
            except RowError as error:
                del self._waiters[request_id]
                on_finished(index, failed_output(row, error, request_id))
        return True

    def _abort_all(self) -> None:
        with self._wake:
            left = [(index, on_finished) for _, _, index, on_finished in self._inbox]
            self._inbox.clear()
        left += self._waiters.values()
        self._waiters.clear()
        reason = f"the engine died: {self.error!r}" if self.error is not None else "the engine was closed"
        for index, on_finished in left:
            on_finished(index, failed_output(None, RowError(ErrorType.ABORTED, reason)))


def failed_output(row: EncodedRow | None, error: RowError, request_id: str = "") -> RequestOutput:
    """The output of a row that never ran."""
    return RequestOutput(
        request_id=request_id,
        prompt=row.prompt if row else None,
        prompt_token_ids=row.prompt_token_ids if row else [],
        outputs=[CompletionOutput(index=0, text="", token_ids=[], finish_reason="error")],
        error_type=str(error.type),
        error_message=str(error),
    )
