"""`rayinfer bench`: rayinfer and its peers on the same rows, one after the other, and what the device would allow."""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import rayinfer
from rayinfer.bench import workloads
from rayinfer.bench.roofline import Ceilings, Shape, bounds
from rayinfer.bench.workloads import Workload
from rayinfer.config import EngineConfig
from rayinfer.errors import ConfigError, RowError

ENGINES = ("rayinfer", "vllm", "transformers")
INTERRUPTED = "interrupted: what was timed until then"
Line = dict[str, Any]


@dataclass
class Bench:
    """What to run: rows, and the engines to run them, in this order.

    `timeout`: seconds for one engine. `shares`: whether steps of ours are profiled afterwards.
    """

    config: EngineConfig
    works: list[Workload]
    engines: Sequence[str] = ()  # default: those installed
    timeout: float = 1800.0
    shares: bool = True
    notes: list[str] = field(default_factory=list)


def plan(
    what: str,
    model: str | None,
    *,
    column: str = "prompt",
    max_tokens: int = 128,
    limit: int | None = None,
    engine_kwargs: Mapping[str, Any] | None = None,
) -> Bench:
    """Read the rows: `what` is a list of workloads (`W1,W5:500`), a job file (.yaml), or a table with a prompt column.

    Raises:
        ConfigError: the model, the table or a setting cannot be used.
    """
    from rayinfer.models.load import inspect_model

    if what.endswith((".yaml", ".yml")):
        from rayinfer.pipelines.job import load_job

        job = load_job(what, limit=limit)
        settings = {**job.model.model_dump(exclude_unset=True), **({"model": model} if model else {})}
        config = EngineConfig.parse(**{**settings, **(engine_kwargs or {})})
        params = job.sampling
        return _of_table(config, Path(what).stem, job.source, job.template(), params.max_tokens, params.temperature)
    if model is None:
        raise ConfigError("--model: which model? A folder, a hub id or a .gguf file")
    config = EngineConfig.parse(model=model, **(engine_kwargs or {}))
    if re.match(r"W\d", what) and not os.path.exists(what):
        vocab = inspect_model(config).vocab_size
        try:
            return Bench(config, workloads.parse(what, vocab))
        except ValueError as error:
            raise ConfigError(str(error)) from None
    from rayinfer.pipelines.job import SourceSpec, resolve_uri
    from rayinfer.pipelines.template import PromptTemplate

    source = SourceSpec(uri=resolve_uri(what, "."), limit=limit)
    template = PromptTemplate(f"{{{{ row[{column!r}] }}}}")
    return _of_table(config, Path(what).stem, source, template, max_tokens, 0.0)


def _of_table(
    config: EngineConfig, name: str, source: Any, template: Any, max_tokens: int | None, temperature: float
) -> Bench:
    """The rows of a table as token ids; each is to get `max_tokens` tokens, or what fits."""
    from rayinfer.inputs import InputProcessor
    from rayinfer.pipelines.sources import SOURCE, ReadUnits, take_census

    census = take_census(source)
    template.check_columns(census.schema.names)
    inputs, reader, rendered, num_bad = InputProcessor(config), ReadUnits(census), [], 0
    for unit in census.units:
        for table in reader.read(unit):
            for row in table[SOURCE].to_pylist():
                try:
                    rendered.append(template.render(row or {}))
                except RowError:
                    num_bad += 1
    encoded = inputs.encode_batch(rendered)
    prompts = [row.prompt_token_ids for row in encoded if not isinstance(row, RowError)]
    num_bad += len(encoded) - len(prompts)
    if not prompts:
        raise ConfigError(f"source.uri = {source.uri!r}: none of {num_bad} row(s) gives a prompt that fits the model")
    most = max_tokens or inputs.max_model_len
    lens = [min(most, inputs.max_model_len - len(prompt)) for prompt in prompts]
    notes = [f"{num_bad} rows are left out: they give no prompt, or one too long"] if num_bad else []
    return Bench(config, [Workload(name, prompts, lens, temperature)], notes=notes)


def choose_engines(names: str | None) -> list[str]:
    """The engines of a comma-separated list; all that are installed by default.

    Raises:
        ConfigError: an unknown name, or a peer that is not installed.
    """
    installed = [name for name in ENGINES if importlib.util.find_spec(name) is not None]
    chosen = list(dict.fromkeys(names.split(","))) if names else installed
    for name in chosen:
        if name not in ENGINES:
            raise ConfigError(f"--engines: {name!r} is none of {', '.join(ENGINES)}")
        if name not in installed:
            raise ConfigError(
                f"--engines: {name} is not installed for {sys.executable}; pip install {name}, or leave it out "
                f"(installed: {', '.join(installed)})"
            )
    return chosen


def run(bench: Bench, tell: Any = print) -> Line:
    """Run every engine in a process of its own; returns the report, which is plain values. `tell` shows progress.

    KeyboardInterrupt ends it: the report is of what was timed until then, and a note says so.

    Raises:
        ConfigError: the model cannot be used.
    """
    from rayinfer.models.load import inspect_model, resolve_device

    info = inspect_model(bench.config)
    engines = list(bench.engines) or choose_engines(None)
    longest = max(len(p) + n for w in bench.works for p, n in zip(w.prompts, w.out_lens, strict=True))
    limit = bench.config.max_model_len or min(info.max_position_embeddings or longest, max(longest, 2048))
    if longest > limit:
        raise ConfigError(f"max_model_len: the longest row has {longest} tokens, the limit is {limit}")
    kwargs = bench.config.model_dump(exclude_unset=True, exclude={"model", "load_format"})
    request = {
        "model": bench.config.model, "load_format": bench.config.load_format, "vocab": info.vocab_size,
        "dtype": str(info.dtype).removeprefix("torch."), "device": resolve_device(bench.config).type,
        "max_model_len": limit, "engine_kwargs": {**kwargs, "max_model_len": limit, "skip_tokenizer_init": True},
        "works": [asdict(work) for work in bench.works], "shares": bench.shares,
    }  # fmt: skip
    lines: list[Line] = []
    try:
        for name in engines:
            tell(f"running {name}")
            if failure := _run_engine(name, request, bench.timeout, lines, tell):
                bench.notes.append(f"{name}: {failure}")
    except KeyboardInterrupt:
        bench.notes.append(INTERRUPTED)
    return {
        "rayinfer": rayinfer.__version__, "date": datetime.date.today().isoformat(), "model": bench.config.model,
        "dtype": request["dtype"], "device": request["device"], "engines": engines, "notes": bench.notes,
        **summarize(bench.works, lines),
    }  # fmt: skip


def _run_engine(name: str, request: Line, timeout: float, lines: list[Line], tell: Any) -> str:
    """Add the lines that an engine's process writes; returns why there are not more of them, if so."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, file) for file in ("request.json", "result.jsonl", "log")]
        paths[0].write_text(json.dumps(request))
        paths[1].touch()
        # With this process's path: this very rayinfer, also when it is not installed.
        code = "import json, sys; sys.path[:] = json.loads(sys.argv.pop()); from rayinfer.bench import engines"
        command = [sys.executable, "-c", f"{code}; engines.main()", name, *map(str, paths[:2])]
        until = time.monotonic() + timeout
        with paths[2].open("wb") as log, paths[1].open() as results:

            def take() -> None:
                for line in map(json.loads, results):
                    lines.append(line)
                    if "output_tok_s" in line:
                        tell(f"{name} {line['workload']}: {line['output_tok_s']:,.0f} output tokens/s")

            process = subprocess.Popen([*command, json.dumps(sys.path)], stdout=log, stderr=log, start_new_session=True)
            try:
                while process.poll() is None and time.monotonic() < until:
                    time.sleep(0.2)
                    take()
                failure = f"ended with exit code {process.returncode}" if process.returncode else ""
                if process.poll() is None:
                    failure = f"stopped after {timeout:.0f} s; --timeout gives it more"
            finally:  # with what it started: vLLM has processes of its own
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                take()
        if failure:
            failure += "\n" + "\n".join(paths[2].read_text(errors="replace").splitlines()[-12:])
        return failure


def summarize(works: Sequence[Workload], lines: Sequence[Line]) -> Line:
    """Ratios of rayinfer to its peers (of equal rows), and the bounds, by workload."""
    ceilings = next(
        (Ceilings(line["flops"], line["bandwidth"], line["source"]) for line in lines if "flops" in line), None
    )
    found: list[Line] = []
    for work in works:
        of: dict[str, Line] = {}
        for line in lines:
            if line.get("workload") == work.name:
                of.setdefault(line["engine"], {}).update(line)
        one: Line = {
            "name": work.name, "rows": len(work.prompts), "sha256": work.digest(), "temperature": work.temperature,
            "input_tokens": work.num_input_tokens, "output_tokens": work.num_output_tokens, "engines": of, "ratios": {},
        }  # fmt: skip
        ours = of.get("rayinfer")
        if ours:
            one["ratios"] = {
                name: ours["output_tok_s"] / line["output_tok_s"]
                for name, line in of.items()
                if name != "rayinfer" and line["sha256"] == ours["sha256"]
            }
            one["shares"] = ours.get("shares")
            if ceilings:
                n, shared = len(work.prompts), work.num_shared_tokens
                lens = {"num_in": work.num_input_tokens / n, "num_out": work.num_output_tokens / n}
                room = {"kv_tokens": ours["kv_tokens"], "max_rows": min(n, ours["max_rows"])}
                one["bounds"] = bounds(Shape(**ours["shape"]), ceilings, **lens, num_shared=shared, **room)
        found.append(one)
    return {"ceilings": ceilings and asdict(ceilings), "workloads": found}


def tables(report: Line) -> list[tuple[list[str], list[list[str]]]]:
    """(header, rows) of what is printed: speeds with ratios and bounds, then shares."""
    engines, peers = report["engines"], [name for name in report["engines"] if name != "rayinfer"]
    speeds, shares, parts = [], [], []
    for one in report["workloads"]:
        values = [one["engines"].get(name, {}).get("output_tok_s") for name in engines]
        limits = (one.get("bounds") or {}).values()
        ratios = [f"{one['ratios'][name]:.2f}" if name in one["ratios"] else "-" for name in peers]
        shown, bound = ([f"{v:,.0f}" if v else "-" for v in some] for some in (values, limits or [None] * 3))
        speeds.append([f"{one['name']} ({one['rows']:,} rows)", *shown, *ratios, *bound])
        if one.get("shares"):
            parts = list(one["shares"])
            shares.append([one["name"], *(f"{share:.0%}" for share in one["shares"].values())])
    ratio_names = [f"rayinfer / {name}" for name in peers]
    header = ["output tokens/s", *engines, *ratio_names, "bound A", "bound B", "bound C"]
    return [(header, speeds), *([(["share of rayinfer's time", *parts], shares)] if shares else [])]


def plot(report: Line, path: Path) -> None:
    """Draw speeds against bound C, or the fastest engine where there is none, and shares.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    works, engines = report["workloads"], report["engines"]
    num = 2 if any(one.get("shares") for one in works) else 1
    size = num * (2.5 + 1.1 * len(works)), 4.2
    figure, axes_of = pyplot.subplots(1, num, figsize=size, layout="constrained", squeeze=False)
    left, right = axes_of[0][0], axes_of[0][-1]
    width = 0.8 / len(engines)
    for at, one in enumerate(works):
        speeds = {name: one["engines"][name]["output_tok_s"] for name in engines if name in one["engines"]}
        limits = one.get("bounds") or {}
        unit = limits.get("C") or max(speeds.values(), default=1.0)
        for number, name in enumerate(engines):
            if name in speeds:
                place, height = at + (number - (len(engines) - 1) / 2) * width, speeds[name] / unit
                left.bar(place, height, width * 0.92, color=f"C{number}", label=name if at == 0 else None)
                left.annotate(f"{speeds[name]:,.0f}", (place, height), ha="center", va="bottom", fontsize=8)
        for name, style in zip("ABC", (":", "--", "-"), strict=True):
            if name in limits:
                label = f"bound {name}" if at == 0 else None
                left.hlines(limits[name] / unit, at - 0.45, at + 0.45, colors="black", linestyles=style, label=label)
        base = 0.0
        for number, (part, share) in enumerate((one.get("shares") or {}).items()):
            right.bar(at, share, 0.6, bottom=base, color=f"C{number + 4}", label=part if at == 0 else None)
            base += share
    left.set_ylabel("output tokens/s, bound C = 1" if any(one.get("bounds") for one in works) else "relative")
    if right is not left:
        right.set_ylabel("share of rayinfer's time")
    for axes in axes_of[0]:
        axes.set_xticks(range(len(works)), [one["name"] for one in works])
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, loc="upper center", ncols=3, bbox_to_anchor=(0.5, 1.18), frameon=False)
    figure.suptitle(f"{Path(report['model']).name}, {report['dtype']}, {report['device']}", fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
