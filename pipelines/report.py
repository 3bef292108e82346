"""What a job came to: the row equation, the errors, tokens, time, and a few rows to look at."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rayinfer.pipelines.log import CommitLog
from rayinfer.pipelines.progress import clock, facts_grid
from rayinfer.processors.columns import OUTPUT

NUM_SAMPLES = 12  # to choose from
_NUM_SHOWN = 4
_RATES = {
    "num_rows_out": "rows_per_second", "num_input_tokens": "input_tokens_per_second",
    "num_generated_tokens": "generated_tokens_per_second",
}  # fmt: skip
_STAGES = {"check": "check", "start": "start Ray", "load": "load model", "run": "inference"}


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
    num_rows_before: int = 0  # done by earlier runs of the job
    errors: dict[str, int] = field(default_factory=dict)
    num_input_tokens: int = 0
    num_generated_tokens: int = 0
    num_cached_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # by stage: check, start, load, run
    samples: list[dict[str, Any]] = field(default_factory=list)
    _before: dict[str, int] = field(default_factory=dict, init=False, repr=False)

    @property
    def complete(self) -> bool:
        return self.status == "complete"

    @property
    def num_rows_out(self) -> int:
        return self.num_ok + self.num_failed

    def per_second(self, name: str) -> float:
        """Rate of inference in this run: loading and starting are not in it."""
        run = self.seconds.get("run")
        return (getattr(self, name) - self._before.get(name, 0)) / run if run else 0.0

    def begin(self, log: CommitLog) -> None:
        """Count what earlier runs did, so that rates are this run's."""
        self.count(log)
        self.num_rows_before = self.num_rows_out
        self._before = {name: getattr(self, name) for name in _RATES}

    def count(self, log: CommitLog) -> None:
        """Take the figures of all rows that are done."""
        parts = log.parts.values()
        self.errors = dict(sum((Counter(part.errors) for part in parts), Counter()))
        self.num_failed, self.num_parts = sum(self.errors.values()), len(parts)
        self.num_ok = log.done.count - self.num_failed
        for name in ("num_bytes", "num_input_tokens", "num_generated_tokens", "num_cached_tokens"):
            setattr(self, name, sum(getattr(part, name) for part in parts))

    @classmethod
    def of_marker(cls, marker: Mapping[str, Any], seconds: dict[str, float]) -> Self:
        """What a job came to whose success marker is there."""
        known = {field.name for field in fields(cls) if field.init}
        result = cls(**{key: value for key, value in marker.items() if key in known})
        result.seconds, result.reason = seconds, f"nothing to do: complete since {marker['finished']}"
        return result

    def as_dict(self) -> dict[str, Any]:
        figures = {key: value for key, value in asdict(self).items() if not key.startswith("_")}
        return {**figures, **{rate: round(self.per_second(name), 3) for name, rate in _RATES.items()}}


def print_report(console: Console, result: JobResult) -> None:
    """Print the summary, fitted to the console's width."""
    if result.samples:
        console.print(_samples(result, console.width))
    sign = "=" if result.num_rows_in == result.num_rows_out else "!="
    equation = f"{result.num_rows_in:,} in {sign} {result.num_ok:,} ok + {result.num_failed:,} failed"
    facts = [("rows", equation + " (checked by key)" * result.complete)]
    facts += [("", f"{error_type}: {count:,}") for error_type, count in Counter(result.errors).most_common()]
    if result.num_rows_out:
        cached = f" ({result.num_cached_tokens:,} from the prefix cache)" if result.num_cached_tokens else ""
        facts.append(("tokens", f"{result.num_input_tokens:,} in{cached}, {result.num_generated_tokens:,} out"))
    if result.seconds.get("run"):
        rows, tokens_in, tokens_out = map(result.per_second, _RATES)
        facts.append(("speed", f"{rows:,.1f} rows/s, {tokens_in:,.0f} tokens/s in, {tokens_out:,.0f} out"))
    stages = ", ".join(f"{_STAGES[key]} {seconds:.1f}s" for key, seconds in result.seconds.items())
    facts.append(("time", f"{clock(sum(result.seconds.values()))}: {stages}"))
    kib = result.num_bytes / 2**10
    size = f"{kib / 2**10:,.1f} MiB" if kib >= 2**10 else f"{kib:.0f} KiB"
    facts.append(("table", f"{result.output} ({result.num_parts:,} part{'s' * (result.num_parts != 1)}, {size})"))
    console.print(facts_grid(facts))
    if result.complete:
        also = ", with failed rows: see error_type and error_message" if result.num_failed else ""
        console.print(Text(f"complete{also}", style="bold yellow" if also else "bold green"))
        if result.reason:
            console.print(Text(result.reason))
    else:
        console.print(Text(f"{result.status}: {result.reason}", style="bold red"))


def _samples(result: JobResult, width: int) -> Table:
    """A few rows: the key, the longest of the row's own texts, what the model answered (or why not)."""
    good = [row for row in result.samples if row["error_type"] is None]
    bad = [row for row in result.samples if row["error_type"] is not None]
    rows = good[: _NUM_SHOWN - bool(bad)] + bad[: max(1, _NUM_SHOWN - len(good))]
    own = [name for name in rows[0] if name not in OUTPUT.names and name != result.key_column]
    shown = sorted(own, key=lambda name: -sum(len(row[name] or "") for row in rows))[:1]
    table = Table(show_lines=True, title="a few rows", title_justify="left", title_style="dim")
    table.add_column(Text(result.key_column), overflow="ellipsis", max_width=max(width // 6, 6))
    for name in (*shown, "generated_text"):
        table.add_column(Text(name), ratio=1, overflow="fold")
    chars = max(width * 2 // 5, 20) * 3  # about three lines
    for row in rows:
        failed = row["error_type"] is not None
        answer = f"{row['error_type']}: {row['error_message']}" if failed else row["generated_text"]
        own_cells = [_cell(row[name], chars) for name in (result.key_column, *shown)]
        table.add_row(*own_cells, _cell(answer, chars, style="red" if failed else ""))
    return table


def _cell(value: Any, chars: int, style: str = "") -> Text:
    """A cell without control codes: a row's text must not steer the terminal."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(value or "")).split())
    return Text(text if len(text) <= chars else text[: chars - 3] + "...", style=style)
