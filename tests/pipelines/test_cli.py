"""The command line as a person uses it, in a process of its own: exit codes, signals, what is on the screen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from rayinfer.pipelines import cli as command_line
from rayinfer.pipelines import run as run_module
from rayinfer.pipelines.report import JobResult
from rayinfer.pipelines.sinks import MARKER
from rayinfer.pipelines.verify import verify

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 400  # seconds, for a busy machine


@pytest.fixture
def job_file(tmp_path: Path, job, table) -> Path:
    pq.write_table(table, tmp_path / "in.parquet")
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job("in.parquet", sink={"uri": "out"})))
    return path


def test_help_names_the_commands_and_loads_little(cli):
    out, _ = cli("--help").communicate(timeout=PATIENCE)
    assert "run " in out
    assert all(command in out for command in ("doctor", "verify", "replay"))
    code = "import sys, rayinfer.pipelines.cli; print({'torch', 'transformers', 'ray'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"
    out, _ = cli("run", "--help").communicate(timeout=PATIENCE)
    assert all(option in out for option in ("--overwrite", "--limit", "--strict", "--json", "--verbose", "--address"))


def test_a_refused_job_exits_with_2(cli, job_file, tmp_path):
    job_file.write_text(job_file.read_text().replace("max_tokens", "max_tokns"))
    process = cli("run", job_file)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert err.startswith("refused: job.yaml: unknown key 'sampling.max_tokns'; did you mean 'max_tokens'?")
    assert not (tmp_path / "out").exists()
    process = cli("run", tmp_path / "no.yaml")
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert "no.yaml': No such file" in err


@pytest.mark.slow
def test_a_job_in_a_pipe(cli, job_file, tmp_path):
    pq.write_table(pa.table({"text": ["one", "two", None]}), tmp_path / "in.parquet")
    process = cli("run", job_file, "--strict", "--json", tmp_path / "summary.json", cwd="/")
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 3, err
    assert "3 in = 2 ok + 1 failed (checked by key)" in out
    assert "\x1b" not in out
    assert err == ""  # nothing of Ray's
    lines = out.splitlines()
    assert lines[0] == "checking the job"
    assert "starting Ray" in lines
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["errors"]) == ("complete", {"TEMPLATE_ERROR": 1})
    assert set(summary["seconds"]) == {"check", "start", "load", "run"}
    assert pq.read_table(tmp_path / "out").num_rows == 3
    process = cli("verify", tmp_path / "out")
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out + err
    assert "3 in, 2 ok + 1 failed" in out
    assert out.endswith("every row is there once\n")
    (next((tmp_path / "out").glob("part-*"))).unlink()
    process = cli("verify", tmp_path / "out")
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "it cannot be read: FileNotFoundError" in out
    for command in ("verify", "replay"):
        process = cli(command, tmp_path)
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 2
        assert "no _rayinfer/job.json there" in err


def test_the_folder_of_the_summary_is_made_before_the_run(job_file, tmp_path, monkeypatch):
    monkeypatch.setattr(command_line, "Stopper", lambda: None)
    job_file.write_text("prompt: x")
    result = CliRunner().invoke(command_line.app, ["run", str(job_file), "--json", str(tmp_path / "new/sum.json")])
    assert result.exit_code == 2, result.output
    assert (tmp_path / "new").is_dir()
    for words in (["run", str(job_file)], ["bench", "W1"]):
        for path in (job_file / "sum.json", tmp_path / "new"):  # below a file, and a folder
            result = CliRunner().invoke(command_line.app, [*words, "--json", str(path)])
            assert result.exit_code == 2, result.output
            said = " ".join(result.output.replace("│", " ").split()).lower()
            assert "file exists" in said or "is a directory" in said


def test_a_stop_that_comes_where_python_drops_it_comes_again():
    """In the callback of a weak reference, as sets of threads and of Ray's have them."""
    script = """
import os, signal, time, weakref
from rayinfer.pipelines.cli import Stopper
class Thing: pass
Stopper()
thing = Thing()
reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGINT))
try:
    del thing
    for _ in range(500):
        time.sleep(0.01)
except KeyboardInterrupt:
    print("stopped")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert (done.stdout, done.stderr) == ("stopped\n", "")


def test_a_job_that_cannot_go_on_is_not_told_to(job_file, monkeypatch):
    monkeypatch.setattr(command_line, "Stopper", lambda: None)
    for reason, told in (("a node died", True), ("a part is gone; start afresh with --overwrite", False)):
        monkeypatch.setattr(run_module, "run_job", lambda *args, r=reason, **kwargs: JobResult(reason=r, num_rows_in=2))
        result = CliRunner().invoke(command_line.app, ["run", str(job_file)])
        assert result.exit_code == 1
        assert ("to go on, type" in result.output) == told


def test_replay_and_verify_take_no_job_of_another_output(job_file, tmp_path, monkeypatch):
    monkeypatch.setattr(command_line, "Stopper", lambda: None)
    for command in ("replay", "verify"):
        result = CliRunner().invoke(command_line.app, [command, str(tmp_path / "other"), "--job", str(job_file)])
        assert result.exit_code == 2
        assert "the job of --job writes to" in result.output
    result = CliRunner().invoke(command_line.app, ["verify", str(tmp_path / "out/"), "--job", str(job_file)])
    assert "no _rayinfer/job.json there" in result.output


def test_sigterm_before_the_start_ends_it_too(cli, job_file):
    process = cli("run", job_file)
    assert process.stdout.readline() == "checking the job\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (130, "stopped before the job began\n")


@pytest.mark.slow
def test_ctrl_c_ends_the_run_cleanly(cli, job_file, tmp_path):
    rows = 50_000  # far more than it gets through
    pq.write_table(pa.table({"text": ["some words"] * rows}), tmp_path / "in.parquet")
    job = yaml.safe_load(job_file.read_text())
    job["sink"]["rows_per_part"] = 16
    job_file.write_text(yaml.safe_dump(job))
    process = cli("run", job_file, start_new_session=True)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        if len(list(tmp_path.glob("out/part-*"))) > 2:
            break
        time.sleep(0.2)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "interrupted: stopped before all rows were done" in out
    assert "Traceback" not in out + err
    assert f"of {rows:,} rows are kept; to go on, type:\n  rayinfer run {job_file}\n" in err
    assert not (tmp_path / "out" / MARKER).exists()
    assert any("rows are not done" in line for line in verify(str(tmp_path / "out"))[1])
    _, alive = psutil.wait_procs(children, timeout=PATIENCE)
    assert alive == []


def test_doctor_tells_versions_device_and_memory(cli):
    process = cli("doctor")
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    for name in ("rayinfer", "torch", "ray", "cores", "memory", "GPU"):
        assert name in out
    assert out.splitlines()[-1].startswith("ready")
