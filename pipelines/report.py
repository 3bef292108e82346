"""What a job came to: the row equation, the errors, tokens, time, and a few rows to look at."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rayinfer.pipelines.keys import KeyDigest
from rayinfer.pipelines.progress import clock
from rayinfer.pipelines.sinks import Entry
from rayinfer.processors.columns import OUTPUT

NUM_SAMPLES = 4


@dataclass
class JobResult:
    """Figures of one run. Seconds are wall time; tokens are the model's."""

    status: str = "incomplete"  # "complete", "incomplete", "interrupted"
    reason: str = ""  # why it is not complete
    output: str = ""
    key_column: str = ""
    num_rows_in: int = 0
    num_ok: int = 0
    num_failed: int = 0
    num_parts: int = 0
    num_bytes: int = 0
    keys_in: str = ""  # digest of the source's keys, see keys.KeyDigest
    keys_out: str = ""
    errors: dict[str, int] = field(default_factory=dict)
    num_input_tokens: int = 0
    num_generated_tokens: int = 0
    num_cached_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # check, start, load, run
    samples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return self.status == "complete"

    @property
    def num_rows_out(self) -> int:
        return self.num_ok + self.num_failed

    @property
    def rows_per_second(self) -> float:
        return self._rate(self.num_rows_out)

    @property
    def generated_tokens_per_second(self) -> float:
        return self._rate(self.num_generated_tokens)

    @property
    def input_tokens_per_second(self) -> float:
        return self._rate(self.num_input_tokens)

    def _rate(self, count: int) -> float:
        seconds = self.seconds.get("run", 0.0)
        return count / seconds if seconds > 0 else 0.0

    def add(self, entry: Entry) -> None:
        self.num_ok += entry.num_ok
        self.num_failed += entry.num_rows - entry.num_ok
        self.num_parts += 1
        self.num_bytes += entry.num_bytes
        for error_type, count in entry.errors.items():
            self.errors[error_type] = self.errors.get(error_type, 0) + count
        self.num_input_tokens += entry.num_input_tokens
        self.num_generated_tokens += entry.num_generated_tokens
        self.num_cached_tokens += entry.num_cached_tokens
        self.samples = (self.samples + entry.samples)[: 3 * NUM_SAMPLES]

    def check_equation(self, keys_in: KeyDigest, keys_out: KeyDigest) -> str:
        """Return what is wrong with in = ok + failed, by count and by key; empty when it holds."""
        self.keys_in, self.keys_out = keys_in.hex(), keys_out.hex()
        if self.num_rows_out != self.num_rows_in:
            return f"the rows do not add up: {self.num_rows_in:,} in, {self.num_ok:,} ok + {self.num_failed:,} failed"
        if keys_in != keys_out:
            return f"{self.num_rows_in:,} rows came out, but not those that went in: a row was lost and another doubled"
        return ""

    def as_dict(self) -> dict[str, Any]:
        rates = {
            name: round(getattr(self, name), 3)
            for name in ("rows_per_second", "input_tokens_per_second", "generated_tokens_per_second")
        }
        return {**asdict(self), **rates, "seconds": {key: round(value, 3) for key, value in self.seconds.items()}}


def print_report(console: Console, result: JobResult) -> None:
    """Print the summary, fitted to the console's width."""
    if result.samples:
        console.print(_samples(result, console.width))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    sign = "=" if result.num_rows_in == result.num_rows_out else "!="
    equation = f"{result.num_rows_in:,} in {sign} {result.num_ok:,} ok + {result.num_failed:,} failed"
    grid.add_row("rows", equation + (" (checked by key)" if result.complete else ""))
    for error_type, count in sorted(result.errors.items(), key=lambda item: -item[1]):
        grid.add_row("", f"{error_type}: {count:,}")
    cached = f" ({result.num_cached_tokens:,} from the prefix cache)" if result.num_cached_tokens else ""
    if result.num_rows_out:
        grid.add_row("tokens", f"{result.num_input_tokens:,} in{cached}, {result.num_generated_tokens:,} out")
    grid.add_row("time", _times(result.seconds))
    if result.num_rows_out:
        grid.add_row(
            "speed",
            f"{result.rows_per_second:,.1f} rows/s, {result.input_tokens_per_second:,.0f} tokens/s in, "
            f"{result.generated_tokens_per_second:,.0f} out",
        )
    grid.add_row(
        "table",
        f"{result.output} ({result.num_parts:,} part{'s' * (result.num_parts != 1)}, {_size(result.num_bytes)})",
    )
    console.print(grid)
    console.print(_verdict(result))


def _verdict(result: JobResult) -> Text:
    if result.complete and not result.num_failed:
        return Text("complete", style="bold green")
    if result.complete:
        return Text("complete, with failed rows: see error_type and error_message", style="bold yellow")
    return Text(f"{result.status}: {result.reason}", style="bold red")


def _times(seconds: dict[str, float]) -> str:
    names = {"check": "check", "start": "start Ray", "load": "load model", "run": "inference"}
    parts = [f"{names[key]} {seconds[key]:.1f}s" for key in names if key in seconds]
    return f"{clock(sum(seconds.values()))}: {', '.join(parts)}"


def _size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _samples(result: JobResult, width: int) -> Table:
    """A few rows: the key, what the row said, what the model answered (or why not)."""
    rows = sorted(result.samples, key=lambda row: row["error_type"] is not None)
    failed = [row for row in rows if row["error_type"] is not None][:1]
    rows = (
        rows[: NUM_SAMPLES - len(failed)] + failed
        if failed and failed[0] not in rows[:NUM_SAMPLES]
        else rows[:NUM_SAMPLES]
    )
    texts = [name for name in rows[0] if name not in OUTPUT.names and name != result.key_column]
    longest = max(texts, key=lambda name: sum(len(str(row[name] or "")) for row in rows), default=None)
    table = Table(expand=False, show_lines=True, title="a few rows", title_justify="left", title_style="dim")
    table.add_column(result.key_column, overflow="ellipsis", max_width=max(width // 6, 6))
    if longest is not None:
        table.add_column(longest, ratio=1, overflow="fold")
    table.add_column("generated_text", ratio=1, overflow="fold")
    chars = max(width * 2 // 5, 20) * 3  # about three lines
    for row in rows:
        failed_row = row["error_type"] is not None
        answer = f"{row['error_type']}: {row['error_message']}" if failed_row else row["generated_text"]
        cells = [_cell(row[result.key_column], chars), *([_cell(row[longest], chars)] if longest is not None else [])]
        table.add_row(*cells, _cell(answer, chars, style="red" if failed_row else ""))
    return table


def _cell(value: Any, chars: int, style: str = "") -> Text:
    """A cell without control codes: a row's text must not steer the terminal."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value if value is not None else "")).split())
    return Text(text if len(text) <= chars else text[: chars - 3] + "...", style=style)
