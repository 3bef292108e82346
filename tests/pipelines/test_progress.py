"""What a person sees: plain lines without control codes, a live line on a terminal, a report of any width."""

from __future__ import annotations

import io
import re
import time

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from rayinfer.pipelines import progress as progress_module
from rayinfer.pipelines.log import CommitLog, Part
from rayinfer.pipelines.progress import Progress, clock
from rayinfer.pipelines.report import JobResult, print_report
from rayinfer.pipelines.store import open_store

STATS = {
    "num_finished": 40, "num_failed": 2, "num_prompt_tokens": 4000, "num_generated_tokens": 800,
    "num_running": 12, "num_waiting": 46, "kv_usage": 0.25,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(progress_module, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(progress_module, "PLAIN_SECONDS", 0.1)


def show(console: Console, seconds: float = 0.5, growing: bool = True) -> Progress:
    polls = 0

    def poll():
        nonlocal polls
        polls += 1
        return {**STATS, "num_finished": min(98, polls)} if growing else None

    start = time.monotonic()
    with Progress(console, 100) as progress:
        progress.phase("loading the model", poll)
        time.sleep(seconds)
        progress.num_written = 5
    assert polls <= (time.monotonic() - start) / progress_module.POLL_SECONDS + 1  # it waits between two polls
    return progress


def test_plain_lines_without_a_terminal():
    output = io.StringIO()
    show(Console(file=output, width=80))
    lines = output.getvalue().splitlines()
    assert lines[0] == "loading the model"
    assert 2 <= len(lines) <= 10  # a busy machine shows fewer
    pattern = (
        r"\d+/100 rows \(\d+%\), 2 failed, [\d.]+ rows/s, eta \w+, "
        r"out 0 tok/s, in 0 tok/s, running 12, waiting 46, KV 25%"
    )
    assert all(re.fullmatch(pattern, line) for line in lines[1:]), lines
    assert "\x1b" not in output.getvalue()
    assert "\r" not in output.getvalue()


def test_before_the_first_row_the_phase_is_told():
    output = io.StringIO()
    show(Console(file=output), growing=False)
    lines = output.getvalue().splitlines()
    assert lines[0] == "loading the model"
    assert all(re.fullmatch(r"loading the model \(\ds\)", line) for line in lines[1:])
    assert lines[1:]


@pytest.mark.parametrize("width", [30, 60, 120])
def test_the_live_line_fits_the_terminal_and_is_gone_at_the_end(width):
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=width, legacy_windows=False)
    show(console)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.getvalue())
    frames = [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]
    assert any("/100 rows" in frame for frame in frames)
    assert any("rows/s" in frame for frame in frames)
    assert max(map(cell_len, frames)) <= width
    assert output.getvalue().rstrip().endswith("\x1b[2K")  # erased: the report takes its place


def test_rates_are_those_of_the_window(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    progress = Progress(Console(file=io.StringIO()), 1000)
    for second in range(101):
        now = float(second)
        rows = second if second <= 50 else 50 + 3 * (second - 50)  # 1 row/s, then 3
        progress._stats = {"num_finished": rows, "num_prompt_tokens": 10 * rows, "num_generated_tokens": 2 * rows}
        progress._note(now)
    assert progress.rates() == pytest.approx((3.0, 30.0, 6.0), rel=0.05)


def test_the_time_before_the_first_row_is_in_no_rate(monkeypatch):
    monkeypatch.setattr(progress_module, "POLL_SECONDS", 0.02)
    begin = time.monotonic()

    def poll():
        return {**STATS, "num_finished": 10, "num_running": 5} if time.monotonic() - begin > 0.5 else None

    with Progress(Console(file=io.StringIO()), 100) as progress:
        progress.phase("loading the model", poll)
        time.sleep(1.0)
    assert progress._history[0][0] - begin > 0.5


def test_clock():
    assert [clock(s) for s in (0, 59.4, 60, 3599, 7620)] == ["0s", "59s", "1m00s", "59m59s", "2h07m"]


def result_of(**changes) -> JobResult:
    sample = {
        "id": 1, "text": "t" * 300, "generated_text": "fine \x1b[31mred\x07 " + "w" * 300, "error_type": None,
        "error_message": None, "finish_reason": "stop",
    }  # fmt: skip
    bad = {**sample, "id": 2, "generated_text": None, "error_type": "PROMPT_TOO_LONG", "error_message": "400 tokens"}
    log = CommitLog(open_store("memory://report"), "0" * 8, 10)
    log.parts["part-1"] = Part("part-1", 10, 4096, "", "", "", {"PROMPT_TOO_LONG": 1}, 1000, 90, 500)
    log.done.add(np.arange(10))
    result = JobResult(status="complete", output="/data/out", key_column="id", num_rows_in=10)
    result.samples = [sample, sample, bad]
    result.count(log)
    result.seconds = {"check": 1.0, "start": 2.0, "load": 3.0, "run": 4.0}
    for name, value in changes.items():
        setattr(result, name, value)
    return result


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_report_fits_and_tells_all(width):
    output = io.StringIO()
    print_report(Console(file=output, width=width), result_of())
    text = output.getvalue()
    assert max(map(cell_len, text.splitlines())) <= width
    flat = re.sub(r"\s+", " ", text)
    for fact in (
        "10 in = 9 ok + 1 failed (checked by key)",
        "PROMPT_TOO_LONG: 1",
        "1,000 in (500 from the prefix cache)",
    ):
        assert fact in flat
    assert "\x1b" not in text  # neither ours, without a terminal, nor the row's
    assert "\x07" not in text


def test_names_and_paths_that_look_like_markup():
    output = io.StringIO()
    result = result_of(output="/data/[/b]out", key_column="[/i]id")
    result.samples = [{"[/i]id": 1, "[/b]text": "t" * 50, "generated_text": "g", "error_type": None}]
    print_report(Console(file=output, width=100), result)
    assert all(name in output.getvalue() for name in ("/data/[/b]out", "[/i]id", "[/b]text"))


def test_an_incomplete_run_says_so():
    output = io.StringIO()
    result = result_of(status="incomplete", reason="a node died", num_rows_in=12)
    print_report(Console(file=output, width=100), result)
    assert "12 in != 9 ok + 1 failed" in output.getvalue()
    assert "checked by key" not in output.getvalue()
    assert output.getvalue().rstrip().endswith("incomplete: a node died")
    assert result.as_dict()["generated_tokens_per_second"] == 22.5
