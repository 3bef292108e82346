"""`rayinfer bench`: the bounds against a table of figures, the report of a run, what is refused."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from rayinfer.bench import report as bench
from rayinfer.bench.engines import part_of
from rayinfer.bench.roofline import Ceilings, Shape, bounds
from rayinfer.bench.workloads import Workload
from rayinfer.config import EngineConfig
from rayinfer.errors import ConfigError

LLAMA = Shape(32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336), 32, 4096, 14336, 32, 8, 128, 128256)
H100 = Ceilings(798e12, 3.0e12, "measured on one")
# Output tokens/s of Llama-3.1-8B in bf16 on that H100 as the program behind the project's design document gives them,
# which was written apart from this one: workload, input, output and shared tokens, bounds A, B and C.
TABLE = [
    ("W1", 512, 128, 0, 11132, 8706, 6950),
    ("W2", 1024, 1024, 0, 12056, 9629, 7957),
    ("W3", 2048, 16, 0, 426, 410, 320),
    ("W4, prefix read once", 1664, 64, 1536, 17541, 15858, 12256),
    ("W5", 220, 190, 0, 25410, 18859, 15138),
]


@pytest.mark.parametrize(("name", "num_in", "num_out", "num_shared", "a", "b", "c"), TABLE)
def test_bounds(name, num_in, num_out, num_shared, a, b, c):
    weights = 2 * (LLAMA.num_body + 2 * LLAMA.num_head)
    kv_tokens = (79.6 * 2**30 - 5 * 2**30 - weights) / LLAMA.kv_bytes  # of an 80 GB card, 5 GiB kept back
    got = bounds(LLAMA, H100, num_in=num_in, num_out=num_out, num_shared=num_shared, kv_tokens=kv_tokens)
    assert got == {name: pytest.approx(value, abs=0.6) for name, value in (("A", a), ("B", b), ("C", c))}


def test_bounds_by_hand():
    """A model of one weight matrix: 2 tokens in, 1 out, one row at a time, nothing but its product or its bytes."""
    shape = Shape(
        num_body=1000, num_layers=0, hidden=10, intermediate=0, num_heads=1, num_kv_heads=1, head_dim=1, vocab=10
    )
    # 2 * 1000 FLOPs for each of 3 tokens and 2 * 100 for the one that is sampled; 2 * 1100 bytes in one step
    got = bounds(shape, Ceilings(6200, 1e9, ""), num_in=2, num_out=1, kv_tokens=100, max_rows=1)
    assert got["A"] == got["B"] == pytest.approx(1)
    assert got["C"] == pytest.approx(0.88)
    got = bounds(shape, Ceilings(1e9, 4400, ""), num_in=2, num_out=1, kv_tokens=100, max_rows=2)
    assert got["A"] == got["B"] == pytest.approx(4)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTT", "gemm"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "gemm"),
        ("_matmul_kernel", "gemm"),
        ("aten::addmm", "gemm"),
        ("aten::mm", "gemm"),
        ("aten::mul", "small"),
        ("_decode_kernel", "attention"),
        ("merge_kernel", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("_add_rms_norm_kernel", "small"),
    ],
)
def test_parts(name, part):
    assert part_of(name) == part


def _line(engine, work, speed, **more):
    return {"engine": engine, "workload": work.name, "sha256": work.digest(), "output_tok_s": speed, **more}


def test_ratios_are_of_equal_rows_alone():
    works = [Workload("one", [[300, 301], [300, 302, 303]], [4, 2]), Workload("two", [[5]], [1])]
    ours = {"kv_tokens": 1000, "max_rows": 8, "shares": {"gemm": 1.0}, "shape": vars(LLAMA)}
    lines = [{"engine": "ceilings", "flops": 1e12, "bandwidth": 1e11, "source": "a test"}]
    lines += [_line("rayinfer", work, 30.0, **ours) for work in works]
    lines += [_line("vllm", works[0], 20.0), {**_line("vllm", works[1], 20.0), "sha256": "of other rows"}]
    report = bench.summarize(works, lines)
    one, two = report["workloads"]
    assert (one["ratios"], two["ratios"]) == ({"vllm": 1.5}, {})
    assert (one["rows"], one["input_tokens"], one["output_tokens"]) == (2, 5, 6)
    assert works[0].num_shared_tokens == 1
    assert two["bounds"]["A"] >= two["bounds"]["B"] > two["bounds"]["C"] > 0


def test_peers_that_are_missing():
    with pytest.raises(
        ConfigError, match=r"--engines: vllm is not installed for .*; pip install vllm, or leave it out"
    ):
        bench.choose_engines("rayinfer,vllm")
    with pytest.raises(ConfigError, match="'vlm' is none of rayinfer, vllm, transformers"):
        bench.choose_engines("vlm")
    assert bench.choose_engines(None) == ["rayinfer", "transformers"]


def test_rows_of_a_table_and_of_a_job(model_path, job, tmp_path):
    rows = pa.table({"text": ["one", None, "three" * 3], "other": [1, 2, 3]})
    pq.write_table(rows, tmp_path / "in.parquet")
    planned = bench.plan(str(tmp_path / "in.parquet"), str(model_path), column="text", max_tokens=7)
    (work,) = planned.works
    assert [len(prompt) for prompt in work.prompts] == [3, 15]  # one token a byte
    assert work.out_lens == [7, 7]
    assert planned.notes == ["1 rows are left out: they give no prompt, or one too long"]
    with pytest.raises(ConfigError, match="the template uses 'txt', which is no column"):
        bench.plan(str(tmp_path / "in.parquet"), str(model_path), column="txt")
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job("in.parquet", sink={"uri": "out"})))
    (work,) = bench.plan(str(path), None, limit=1).works
    assert len(work.prompts) == 1
    assert work.name == "job"


@pytest.mark.slow
def test_a_run_from_the_command_line(cli, model_path, tmp_path):
    pq.write_table(pa.table({"prompt": ["some words", "more", "the last"]}), tmp_path / "in.parquet")
    kwargs = json.dumps({"device": "cpu", "num_threads": 1, "cpu_kv_cache_gib": 0.01})
    options = ["--model", model_path, "--max-tokens", "5", "--engine-kwargs", kwargs]
    options += ["--json", tmp_path / "bench.json", "--plot", tmp_path / "bench.png"]
    process = cli("bench", tmp_path / "in.parquet", *options)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, out + err
    assert "rayinfer / transformers" in " ".join(out.split())
    report = json.loads((tmp_path / "bench.json").read_text())
    assert set(report) == {
        "rayinfer", "date", "model", "dtype", "device", "engines", "notes", "ceilings", "workloads"
    }  # fmt: skip
    assert report["engines"] == ["rayinfer", "transformers"]
    (one,) = report["workloads"]
    assert (one["rows"], one["output_tokens"], one["input_tokens"]) == (3, 15, 22)
    speeds = {name: line["output_tok_s"] for name, line in one["engines"].items()}
    assert one["ratios"] == {"transformers": pytest.approx(speeds["rayinfer"] / speeds["transformers"])}
    assert sum(one["shares"].values()) == pytest.approx(1, abs=1e-6)
    assert list(one["shares"]) == ["attention", "gemm", "small", "host"]
    assert one["bounds"]["A"] >= one["bounds"]["B"] >= one["bounds"]["C"] > 0


def test_lines_of_an_engine_are_one():
    """Times come first, shares at the end: an engine that is cut short has its times."""
    work = Workload("one", [[300, 301]], [4])
    ours = {"kv_tokens": 1000, "max_rows": 8, "shape": vars(LLAMA)}
    lines = [_line("rayinfer", work, 30.0, **ours)]
    assert "shares" not in bench.summarize([work], lines)["workloads"][0]["engines"]["rayinfer"]
    lines.append({"engine": "rayinfer", "workload": "one", "shares": {"gemm": 1.0}})
    (one,) = bench.summarize([work], lines)["workloads"]
    assert one["shares"] == {"gemm": 1.0}
    assert one["engines"]["rayinfer"]["output_tok_s"] == 30.0


@pytest.mark.slow
def test_times_alone(model_path):
    config = EngineConfig.parse(model=str(model_path), device="cpu", cpu_kv_cache_gib=0.01)
    planned = bench.Bench(config, [Workload("one", [[3, 4]], [3])], ["rayinfer"], shares=False)
    report = bench.run(planned, str)
    assert report["notes"] == []
    assert report["workloads"][0]["shares"] is None
    assert len(bench.tables(report)) == 1
    assert report["workloads"][0]["engines"]["rayinfer"]["output_tok_s"] > 0


@pytest.mark.slow
def test_an_interrupted_run_reports_what_it_timed(model_path):
    config = EngineConfig.parse(model=str(model_path), device="cpu")
    works = [Workload("one", [[3, 4]], [3]), Workload("two", [[5] * 20] * 5000, [20] * 5000)]
    planned = bench.Bench(config, works, ["transformers"])

    def tell(text):
        if "one" in text:
            raise KeyboardInterrupt

    report = bench.run(planned, tell)
    assert report["notes"] == [bench.INTERRUPTED]
    first, second = report["workloads"]
    assert first["engines"]["transformers"]["output_tok_s"] > 0
    assert second["engines"] == {}
