"""What a person sees while a job runs: a live line on a terminal, a plain line every few seconds elsewhere."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

POLL_SECONDS = 1.0
PLAIN_SECONDS = 5.0
RATE_SECONDS = 30.0  # rates are means over this window: long enough not to jump, short enough to be news

Stats = Mapping[str, Any]


class Progress:
    """Shows a job of `num_rows` rows until it is closed.

    The counters shown are num_finished, num_failed, num_prompt_tokens, num_generated_tokens, num_running, num_waiting
    and kv_usage (0 to 1), as StatsBoard.snapshot gives them.
    """

    def __init__(self, console: Console, num_rows: int, num_before: int = 0):
        self._console, self._num_rows, self._num_before = console, num_rows, num_before
        self._poll: Callable[[], Stats | None] = lambda: None
        self._phase, self._phase_start, self._counters = "", time.monotonic(), True
        self.num_written = num_before  # rows that are committed, those of earlier runs (`num_before`) among them
        self._stats: Stats = {}
        self._history: deque[tuple[float, ...]] = deque()  # time, rows, prompt tokens, generated tokens
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._stop, self._spinner = threading.Event(), Spinner("dots")
        self._thread = threading.Thread(target=self._run, name="rayinfer-progress", daemon=True)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        if self._live:
            self._live.stop()

    def phase(self, name: str, poll: Callable[[], Stats | None] | None = None, *, counters: bool = True) -> None:
        """Say what the job does now; with `counters`, these are shown instead from the first running row on.

        `poll`, if given, is called about once a second from then on, in the display's own thread.
        """
        self._phase, self._phase_start, self._counters = name, time.monotonic(), counters
        self._poll = poll or self._poll
        if self._live:
            self._live.update(self._render(), refresh=True)
        else:
            self._console.print(Text(name))

    @property
    def num_done(self) -> int:
        ended = self._stats.get("num_finished", 0) + self._stats.get("num_failed", 0)
        return min(max(self._num_before + ended, self.num_written), self._num_rows)

    def _run(self) -> None:
        next_plain = time.monotonic() + PLAIN_SECONDS
        while not self._stop.wait(POLL_SECONDS):
            self._stats = self._poll() or self._stats
            if self._started():  # what is shown is of rows that run, not of the time before
                self._note(time.monotonic())
            if self._live:
                self._live.update(self._render(), refresh=True)
            elif time.monotonic() >= next_plain:
                next_plain = time.monotonic() + PLAIN_SECONDS
                line = f"{self._rows()}, {', '.join(self._facts())}" if self._started() else self._waiting()
                self._console.print(Text(line), soft_wrap=True)

    def _note(self, now: float) -> None:
        tokens = (self._stats.get("num_prompt_tokens", 0), self._stats.get("num_generated_tokens", 0))
        self._history.append((now, self.num_done, *tokens))
        while len(self._history) > 2 and now - self._history[0][0] > RATE_SECONDS:
            self._history.popleft()

    def rates(self) -> tuple[float, ...]:
        """Rows, prompt tokens and generated tokens a second, over the last RATE_SECONDS."""
        moments = self._history or [(0.0,) * 4]
        seconds, *counts = (last - first for first, last in zip(moments[0], moments[-1], strict=True))
        return tuple(count / max(seconds, 1e-9) for count in counts)

    def _started(self) -> bool:
        return self._counters and bool(self.num_done > self._num_before or self._stats.get("num_running"))

    def _waiting(self) -> str:
        return f"{self._phase} ({clock(time.monotonic() - self._phase_start)})"

    def _rows(self) -> str:
        return f"{self.num_done:,}/{self._num_rows:,} rows ({self.num_done / self._num_rows:.0%})"

    def _facts(self) -> list[str]:
        """The figures, the most wanted first: a narrow terminal drops the last ones."""
        rows, tokens_in, tokens_out = self.rates()
        stats, left = self._stats, self._num_rows - self.num_done
        return [
            *([f"{stats['num_failed']:,} failed"] if stats.get("num_failed") else []), f"{rows:,.1f} rows/s",
            *([f"eta {clock(left / rows)}"] if rows > 0 and left else []), f"out {tokens_out:,.0f} tok/s",
            f"in {tokens_in:,.0f} tok/s", f"running {stats.get('num_running', 0):,}",
            f"waiting {stats.get('num_waiting', 0):,}", f"KV {stats.get('kv_usage', 0.0):.0%}",
        ]  # fmt: skip

    def _render(self) -> RenderableType:
        if not self._started():
            self._spinner.update(text=Text(self._waiting()))
            return self._spinner
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        bar.add_row(ProgressBar(total=self._num_rows, completed=self.num_done), Text(self._rows()))
        facts = self._facts()
        while len("  ".join(facts)) > self._console.width:
            facts.pop()
        return Group(bar, Text("  ".join(facts), style="dim", no_wrap=True))


def facts_grid(facts: Iterable[tuple[str, str]]) -> Table:
    """Names and values, as they are: a path or a column may look like markup."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts:
        grid.add_row(name, Text(value))
    return grid


def clock(seconds: float) -> str:
    """`42s`, `3m05s`, `2h07m`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds % 60:02d}s"
