"""The command line: `rayinfer run`, `rayinfer doctor`."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rayinfer.errors import ConfigError

COMPLETE, INCOMPLETE, REFUSED, FAILED_ROWS, INTERRUPTED = 0, 1, 2, 3, 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Run an LLM over every row of a table, through Ray Data.",
)


@app.command()
def run(
    job: Annotated[Path, typer.Argument(help="Job file (YAML); its relative paths are relative to its folder.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output of an earlier job.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows of the source.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 if any row failed.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the summary to this file as JSON.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster; default: one of its own on this machine.")] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show Ray's logs, and the trace of what went wrong.")
    ] = False,
) -> None:
    """Answer every row of a table as JOB says, and write the answers as a table.

    Exit codes: 0 complete; 1 incomplete; 2 refused before the start; 3 failed rows (--strict); 130 stopped by Ctrl-C.
    """
    console = Console()
    errors = Console(stderr=True)
    _Stopper()
    try:
        from rayinfer.pipelines.job import load_job

        spec = load_job(job, limit=limit)
        console.print(Text("checking the job", style="dim"))
        from rayinfer.pipelines.report import print_report
        from rayinfer.pipelines.run import run_job
        from rayinfer.pipelines.sinks import list_files

        result = run_job(spec, overwrite=overwrite, address=address, verbose=verbose, console=console)
    except ConfigError as error:
        for line in str(error).splitlines():
            errors.print(Text.assemble(("refused: ", "bold red"), line), soft_wrap=True)
        raise typer.Exit(REFUSED) from None
    except KeyboardInterrupt:
        errors.print("stopped before the job began", style="bold red")
        raise typer.Exit(INTERRUPTED) from None
    print_report(console, result)
    if json_file is not None:
        json_file.write_text(json.dumps(result.as_dict(), indent=1, default=str) + "\n", encoding="utf-8")
    if not result.complete:
        parts = len(list_files(spec.sink))
        errors.print(
            Text(f"{parts} file(s) stay in {result.output}, not a whole table; run again with --overwrite"),
            soft_wrap=True,
        )
        raise typer.Exit(INTERRUPTED if result.status == "interrupted" else INCOMPLETE)
    if strict and result.num_failed:
        raise typer.Exit(FAILED_ROWS)


@app.command()
def doctor() -> None:
    """Show versions, device and memory, and what is missing."""
    from rayinfer.pipelines.doctor import examine

    console = Console()
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    facts, missing = examine()
    for name, value in facts:
        grid.add_row(name, Text(value))
    console.print(grid)
    for line in missing:
        console.print(Text(f"missing: {line}", style="yellow"), soft_wrap=True)
    console.print(Text("ready" if not missing else "ready, without what is missing", style="bold green"))


class _Stopper:
    """Ctrl-C and SIGTERM: the first stops the run, what comes while it stops is ignored, the third ends the process."""

    def __init__(self) -> None:
        self.count = 0
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self)

    def __call__(self, signum: int, frame: Any) -> None:
        self.count += 1
        if self.count == 1:
            raise KeyboardInterrupt
        if self.count > 2:
            os._exit(INTERRUPTED)


def main() -> None:
    """Entry point of the `rayinfer` command."""
    sys.exit(app())


if __name__ == "__main__":
    main()
