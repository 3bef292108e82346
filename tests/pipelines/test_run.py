"""Whole jobs with a tiny model: tables are read back with pyarrow, texts compared with transformers' own."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from rayinfer.errors import ConfigError
from rayinfer.pipelines import run as run_module
from rayinfer.pipelines.job import JobSpec
from rayinfer.pipelines.report import JobResult
from rayinfer.pipelines.run import run_job
from rayinfer.pipelines.sinks import MARKER
from rayinfer.pipelines.store import META
from rayinfer.pipelines.verify import verify

WRITERS = {
    "parquet": pq.write_table,
    "csv": pyarrow.csv.write_csv,
    "jsonl": lambda table, path: path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist())),
}


def run(job: dict[str, Any], **kwargs: Any) -> tuple[JobResult, str]:
    """Run a job; returns its result and what it printed."""
    output = io.StringIO()
    result = run_job(JobSpec.parse(job), console=Console(file=output, width=100), **kwargs)
    return result, output.getvalue()


def read_parts(folder: Path, format: str) -> pa.Table:
    read = {
        "parquet": pq.read_table,
        "jsonl": pyarrow.json.read_json,
        "csv": lambda path: pyarrow.csv.read_csv(path, parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True)),
    }[format]
    parts = [read(folder / name) for name in sorted(os.listdir(folder)) if name.startswith("part-")]
    return pa.concat_tables(parts, promote_options="permissive")


def reference_texts(model_path: str, prompts: list[str]) -> list[str]:
    """Greedy texts by transformers, one prompt at a time, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    texts = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = model.generate(ids, do_sample=False, max_new_tokens=4, pad_token_id=0)
        texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


@pytest.mark.parametrize(("source", "sink"), [("parquet", "jsonl"), ("csv", "parquet")])
def test_a_table_goes_in_and_comes_out(tmp_path, local_ray, model_path, job, table, source, sink):
    path = tmp_path / f"in.{source}"
    WRITERS[source](table, path)
    spec = job(
        {"uri": str(path), "id_column": "id"},
        sink={"uri": str(tmp_path / "out"), "format": sink, "rows_per_part": 5},
        processor={"batch_size": 4},
    )
    if sink == "jsonl":
        spec |= {"prompt": None, "messages": [{"role": "user", "content": "Say: {{ text }}"}]}
    result, shown = run(spec)
    assert (result.status, result.num_rows_in, result.num_ok) == ("complete", 12, 12), result.reason
    out = read_parts(tmp_path / "out", sink).sort_by("id")
    assert result.num_generated_tokens == pa.compute.sum(out["num_generated_tokens"]).as_py() > 12
    assert out.select(table.column_names).cast(table.schema).to_pylist() == table.to_pylist()
    marker = json.loads((tmp_path / "out" / MARKER).read_text())
    assert {part["name"] for part in marker["parts"]} | {MARKER, META} == set(os.listdir(tmp_path / "out"))
    assert (marker["num_ok"], marker["status"]) == (12, "complete")
    assert "12 rows from 1 file " in shown
    begin = "[user]Say: " if sink == "jsonl" else "Say: "
    end = "[bot]" if sink == "jsonl" else ""
    prompts = [f"{begin}{text}{end}" for text in table["text"].to_pylist()]
    assert out["generated_text"].to_pylist() == reference_texts(model_path, prompts)


def test_bad_rows_cost_themselves_only(tmp_path, local_ray, job, model_path):
    lines = [json.dumps({"text": text}) for text in ("good", "also good", "", None, "x" * 500, "last")]
    lines.insert(2, '{"text": ')
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    spec = job(tmp_path / "in.jsonl", prompt="{{ text }}", sink={"uri": str(tmp_path / "out"), "rows_per_part": 3})
    result, _ = run(spec)
    assert (result.status, result.num_ok, result.num_failed) == ("complete", 3, 4), result.reason
    assert result.errors == {"INVALID_PROMPT": 2, "TEMPLATE_ERROR": 1, "PROMPT_TOO_LONG": 1}
    folder = tmp_path / "out"
    assert len({str(pq.read_schema(folder / name)) for name in os.listdir(folder) if name.startswith("part-")}) == 1
    rows = {row["row_key"]: row for row in read_parts(folder, "parquet").to_pylist()}
    assert sorted(rows) == [f"in.jsonl#{i}" for i in range(7)]
    errors = {key[-1]: (row["error_type"], row["error_stage"]) for key, row in rows.items() if row["error_type"]}
    assert errors == {
        "2": ("INVALID_PROMPT", "read"),
        "3": ("INVALID_PROMPT", "encode"),
        "4": ("TEMPLATE_ERROR", "preprocess"),
        "5": ("PROMPT_TOO_LONG", "encode"),
    }
    assert rows["in.jsonl#2"]["error_message"].startswith("record 2 (from 0) is not valid JSON")
    assert rows["in.jsonl#5"]["text"] == "x" * 500  # a failed row keeps its input
    good = [rows[f"in.jsonl#{i}"]["generated_text"] for i in (0, 1, 6)]
    assert good == reference_texts(model_path, ["good", "also good", "last"])


@pytest.mark.parametrize("format", ["jsonl", "csv", "delta"])
def test_a_bad_line_costs_one_row_of_a_job_with_ids_too(tmp_path, local_ray, job, format):
    if format == "delta":
        pytest.importorskip("deltalake")
    lines = [json.dumps({"id": i if format == "csv" else f"i{i}", "text": "x" * i}) for i in range(5)]
    lines[1:1] = ['{"id": ', "[]"]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    source = {"uri": str(tmp_path / "in.jsonl"), "id_column": "id"}
    spec = job(source, prompt="{{ text }}", sink={"uri": str(tmp_path / "out"), "format": format, "rows_per_part": 2})
    for replay in (False, True):
        result, _ = run(spec, replay=replay)
        assert (result.status, result.num_ok, result.num_failed) == ("complete", 4, 3), result.reason
        assert result.errors == {"INVALID_PROMPT": 3}
        facts, wrong = verify(str(tmp_path / "out"))
        assert wrong == []
        assert ("keys", "7 read, none twice") in facts
    rows = read_parts(tmp_path / "out", "parquet" if format == "delta" else format).to_pylist()
    assert sorted(str(row["id"]) for row in rows if row["id"] is not None) == sorted(
        str(i) if format == "csv" else f"i{i}" for i in range(5)
    )
    lost = sorted((row for row in rows if row["id"] is None), key=lambda row: row["error_message"])
    assert [row["error_stage"] for row in lost] == ["read", "read"]
    assert lost[0]["error_message"].startswith("in.jsonl#1: record 1 (from 0) is not valid JSON")
    assert lost[1]["error_message"] == "in.jsonl#2: record 2 (from 0) is a list, not an object"
    next((tmp_path / "out").glob("part-*")).unlink()
    assert "the keys of the table are not those of the source" in verify(str(tmp_path / "out"))[1]


def test_on_error_raise_stops_and_names_the_row(tmp_path, local_ray, job):
    pq.write_table(pa.table({"id": ["a", "bad-one"], "text": ["x", None]}), tmp_path / "in.parquet")
    source = {"uri": str(tmp_path / "in.parquet"), "id_column": "id"}
    result, _ = run(job(source, on_error="raise"))
    assert result.status == "incomplete"
    assert "bad-one" in result.reason
    assert "TEMPLATE_ERROR" in result.reason
    assert "Traceback" not in result.reason
    assert len(result.reason.splitlines()) == 1  # no advice of Ray's
    assert "on_error: record keeps such a row" in result.reason
    assert "--overwrite" in result.reason  # so nobody is told to type the same again, see test_cli.py
    assert not (tmp_path / "out" / MARKER).exists()
    result, _ = run(job(source, on_error="record"))  # as it says: the same job goes on
    assert (result.status, result.num_ok, result.num_failed) == ("complete", 1, 1), result.reason


def test_overwrite_replaces_the_earlier_table(tmp_path, local_ray, job, table):
    pq.write_table(table, tmp_path / "in.parquet")
    (tmp_path / "out").mkdir()
    for name in ("part-old.csv", "part-old.parquet", MARKER):
        (tmp_path / "out" / name).write_text("of an earlier job")
    spec = job({"uri": str(tmp_path / "in.parquet"), "limit": 3}, sink={"uri": str(tmp_path / "out"), "format": "csv"})
    with pytest.raises(ConfigError, match=r"but no _rayinfer/job.json; give --overwrite"):
        run(spec)
    assert len(list((tmp_path / "out").glob("*.*"))) == 3
    for prompt in ("Say: {{ text }}", "Tell: {{ text }}"):  # the second replaces a job of ours
        result, _ = run(spec | {"prompt": prompt}, overwrite=True)
        assert result.complete, result.reason
        assert len(list((tmp_path / "out").glob("*.*"))) == 2
        assert len(list((tmp_path / "out" / META).glob("log-*"))) == 1
        assert read_parts(tmp_path / "out", "csv")["row_key"].to_pylist() == [f"in.parquet#{i}" for i in range(3)]
    with pytest.raises(ConfigError, match=r"prompt: 'Tell: {{ text }}' -> 'Say: {{ text }}'"):
        run(spec)


# Refusals: before Ray is started or used, within 30 s (seconds, here).


@pytest.fixture
def refused(tmp_path, monkeypatch, table):
    """refused(job) -> the message; fails if the job got as far as Ray."""
    pq.write_table(table, tmp_path / "in.parquet")

    def no_ray(*args: Any):
        raise RuntimeError("the job was not refused")

    def check(job: dict[str, Any]) -> str:
        monkeypatch.setattr(run_module, "_ray", no_ray)
        with pytest.raises(ConfigError) as caught:
            run(job)
        return str(caught.value)

    return check


def test_refused_for_its_source_template_or_sink(tmp_path, job, refused):
    source = tmp_path / "in.parquet"
    (tmp_path / "file").touch()
    assert "no file there" in refused(job(tmp_path / "nowhere.parquet"))
    assert "did you mean 'text'?" in refused(job(source, prompt="{{ txt }}"))
    assert "source.id_column: 'key'" in refused(job({"uri": str(source), "id_column": "key"}))
    assert "sink.columns: 'txt'" in refused(job(source, sink={"uri": str(tmp_path / "out"), "columns": ["txt"]}))
    assert "cannot be written" in refused(job(source, sink={"uri": str(tmp_path / "file/out")}))
    assert "share a folder" in refused(job({"uri": str(tmp_path), "format": "parquet"}))
    pq.write_table(pa.table({"id": [1, 1], "text": ["a", "b"]}), tmp_path / "twice.parquet")
    assert "id '1' is there more than once" in refused(job({"uri": str(tmp_path / "twice.parquet"), "id_column": "id"}))
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    assert "no rows in 1 parquet file" in refused(job(tmp_path / "empty.parquet"))


def test_refused_for_its_model(tmp_path, job, refused, model_path):
    import torch
    from safetensors.torch import save_file

    source = tmp_path / "in.parquet"
    assert "no such folder" in refused(job(source, model=str(tmp_path / "no/model")))
    assert "no such file" in refused(job(source, model=str(tmp_path / "model.gguf")))
    half = tmp_path / "half"
    half.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (half / name).write_bytes((Path(model_path) / name).read_bytes())
    assert "half" in refused(job(source, model=str(half)))
    save_file({"a": torch.zeros(1)}, half / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (half / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert "model-00002-of-00002.safetensors" in refused(job(source, model=str(half)))
    (half / "model.safetensors.index.json").unlink()
    (half / "model.safetensors").write_bytes((Path(model_path) / "model.safetensors").read_bytes())
    messages = [{"role": "user", "content": "{{ text }}"}]
    assert "has no chat template" in refused(job(source, model=str(half), prompt=None, messages=messages))
