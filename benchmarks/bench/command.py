"""The command `rayinfer bench`, beside what it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rayinfer.errors import ConfigError


def bench(
    what: Annotated[str, typer.Argument(help="Workloads (W1,W5:500,W4x8,W1@1), a job file, or a table.")] = "W1,W5",
    model: Annotated[str | None, typer.Option(help="Folder, hub id or .gguf; of a job file: its own.")] = None,
    engines: Annotated[str | None, typer.Option(help="Of rayinfer,vllm,transformers; default: installed ones.")] = None,
    column: Annotated[str, typer.Option(help="Column of the table that holds the prompts.")] = "prompt",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate for each row of the table.")] = 128,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows of the table or job.")] = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="MODEL needs only a config.json.")] = False,
    engine_kwargs: Annotated[str, typer.Option(help="More settings of rayinfer's engine, as JSON.")] = "{}",
    shares: Annotated[bool, typer.Option(help="Then profile steps of each workload: as long again.")] = True,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for one engine.")] = 1800.0,
    json_file: Annotated[Path, typer.Option("--json", help="The report.")] = Path("bench.json"),
    plot: Annotated[Path, typer.Option(help="The picture.")] = Path("bench.png"),
) -> None:
    """Time rayinfer and its peers on the same rows, and say what the device would allow.

    Every row generates a fixed number of tokens. Exit codes: 0; 1 an engine did not end well; 2 refused; 130
    interrupted, with a report of what was timed until then.
    """
    from rayinfer.bench import report as timing
    from rayinfer.pipelines import cli

    console = Console()
    cli.Stopper()
    try:
        for path in (json_file, plot):  # they come last, after many minutes
            path.parent.mkdir(parents=True, exist_ok=True)
        json_file.open("a").close()
        kwargs = json.loads(engine_kwargs)
        if not isinstance(kwargs, dict):
            raise ConfigError(f"--engine-kwargs: want a JSON object, not {engine_kwargs}")
        if random_weights:
            kwargs["load_format"] = "dummy"
        chosen = timing.choose_engines(engines)
        options: dict[str, Any] = {"column": column, "max_tokens": max_tokens, "limit": limit, "engine_kwargs": kwargs}
        planned = timing.plan(what, model, **options)
        planned.engines, planned.timeout, planned.shares = chosen, timeout, shares
        report = timing.run(planned, lambda text: console.print(Text(text, style="dim")))
    except json.JSONDecodeError as error:
        cli.refuse(ConfigError(f"--engine-kwargs: not JSON: {error}"))
    except KeyboardInterrupt:
        raise typer.Exit(cli.INTERRUPTED) from None
    except (ConfigError, OSError) as error:
        cli.refuse(error)
    for header, rows in timing.tables(report):
        table = Table(*header, show_lines=False)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    if report["ceilings"]:
        peak, bandwidth = report["ceilings"]["flops"] / 1e12, report["ceilings"]["bandwidth"] / 1e12
        source = report["ceilings"]["source"]
        console.print(Text(f"bounds from {peak:.4g} TFLOP/s and {bandwidth:.3g} TB/s, {source}"), soft_wrap=True)
        console.print(Text("A: all that can overlap does; B: kernels one after another; C: as good kernels do it"))
    json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    try:
        timing.plot(report, plot)
    except ImportError:
        console.print(Text("no picture: it needs matplotlib, pip install 'rayinfer[bench]'"))
    for note in report["notes"]:
        Console(stderr=True).print(Text(note, style="yellow"), soft_wrap=True)
    if timing.INTERRUPTED in report["notes"]:
        raise typer.Exit(cli.INTERRUPTED)
    if any(name not in one["engines"] for one in report["workloads"] for name in chosen):
        raise typer.Exit(cli.INCOMPLETE)
