"""The command line: `rayinfer run`, `replay`, `verify`, `bench`, `doctor`."""

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from rayinfer.bench.command import bench
from rayinfer.errors import ConfigError, bare_uri
from rayinfer.pipelines.progress import facts_grid

INCOMPLETE, REFUSED, FAILED_ROWS, INTERRUPTED = 1, 2, 3, 130

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


_Strict = Annotated[bool, typer.Option("--strict", help="Exit with 3 if any row failed.")]
_Json = Annotated[Path | None, typer.Option("--json", dir_okay=False, help="Write the summary to this file as JSON.")]
_Address = Annotated[str | None, typer.Option(help="Ray cluster; default: one of its own on this machine.")]
_Verbose = Annotated[bool, typer.Option("--verbose", help="Show Ray's logs, and the trace of what went wrong.")]
_JobFile = Annotated[Path | None, typer.Option("--job", help="Job file, if it holds what no log may keep.")]
_Output = Annotated[str, typer.Argument(help="Folder that a job wrote; any fsspec URI.")]


@app.callback()
def _about() -> None:
    """Run an LLM over every row of a table, through Ray Data."""


@app.command()
def run(
    job: Annotated[Path, typer.Argument(help="Job file (YAML); its relative paths are relative to its folder.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output of an earlier job.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows of the source.")] = None,
    strict: _Strict = False, json_file: _Json = None, address: _Address = None, verbose: _Verbose = False,
) -> None:  # fmt: skip
    """Answer every row of a table as JOB says, and write the answers as a table. Again: go on where it stopped.

    Exit codes: 0 complete; 1 incomplete, the same command goes on; 2 refused before the start; 3 failed rows
    (--strict); 130 stopped by Ctrl-C, the same command goes on.
    """
    from rayinfer.pipelines.job import load_job

    options = {"overwrite": overwrite, "address": address, "verbose": verbose}
    _execute(lambda: load_job(job, limit=limit), strict, json_file, options)


@app.command()
def replay(
    output: _Output, job: _JobFile = None, strict: _Strict = False, json_file: _Json = None, address: _Address = None,
    verbose: _Verbose = False,
) -> None:  # fmt: skip
    """Run the failed rows of a complete job again. Exit codes: as of `run`."""

    from rayinfer.pipelines.identity import recall_job

    options = {"replay": True, "address": address, "verbose": verbose}
    _execute(lambda: _job_of(output, job) if job else recall_job(output), strict, json_file, options)


@app.command()
def verify(output: _Output, job: _JobFile = None) -> None:
    """Prove that OUTPUT has every row of its source once. Exit codes: 0 it has; 1 it has not; 2 no job's output."""
    from rayinfer.pipelines.job import resolve_uri
    from rayinfer.pipelines.verify import verify

    try:
        facts, wrong = verify(resolve_uri(output, "."), None if job is None else _job_of(output, job).sink)
    except ConfigError as error:
        refuse(error)
    Console().print(facts_grid(facts))
    for line in wrong:
        Console().print(Text(f"wrong: {line}", style="bold red"), soft_wrap=True)
    if wrong:
        raise typer.Exit(INCOMPLETE)
    Console().print(Text("every row is there once", style="bold green"))


def _job_of(output: str, path: Path) -> Any:
    """The job file at `path`. Raises ConfigError if its output is another one."""
    from rayinfer.pipelines.job import load_job, resolve_uri

    job = load_job(path)
    if len({bare_uri(uri).rstrip("/") for uri in (resolve_uri(output, "."), job.sink.uri)}) > 1:
        raise ConfigError(f"OUTPUT = {output!r}: the job of --job writes to {job.sink.uri!r}; name that, or its job")
    return job


def _execute(load: Callable[[], Any], strict: bool, json_file: Path | None, options: dict[str, Any]) -> None:
    """Run a job, print what it came to, and exit with its code."""
    console, errors = Console(), Console(stderr=True)
    Stopper()
    try:
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)  # what it is for comes after hours
            json_file.open("a").close()
        spec = load()
        console.print(Text("checking the job", style="dim"))
        from rayinfer.pipelines.report import print_report
        from rayinfer.pipelines.run import run_job

        result = run_job(spec, **options, console=console)
    except (ConfigError, OSError) as error:
        refuse(error)
    except KeyboardInterrupt:
        errors.print("stopped before the job began", style="bold red")
        raise typer.Exit(INTERRUPTED) from None
    print_report(console, result)
    if json_file is not None:
        json_file.write_text(json.dumps(result.as_dict(), indent=1, default=str) + "\n", encoding="utf-8")
    if not result.complete:
        if "--overwrite" not in result.reason:  # else the same command comes no further
            errors.print(Text(f"{result.num_rows_out:,} of {result.num_rows_in:,} rows are kept; to go on, type:"))
            again = shlex.join(word for word in sys.argv[1:] if word != "--overwrite")
            errors.print(Text(f"  rayinfer {again}"), soft_wrap=True)
        raise typer.Exit(INTERRUPTED if result.status == "interrupted" else INCOMPLETE)
    if strict and result.num_failed:
        raise typer.Exit(FAILED_ROWS)


def refuse(error: Exception) -> NoReturn:
    """Say what the user has to change, and exit."""
    for line in bare_uri(str(error)).splitlines():
        Console(stderr=True).print(Text.assemble(("refused: ", "bold red"), line), soft_wrap=True)
    raise typer.Exit(REFUSED) from None


app.command()(bench)


@app.command()
def doctor() -> None:
    """Show versions, device and memory, and what is missing."""
    from rayinfer.pipelines.doctor import examine

    console = Console()
    facts, missing = examine()
    console.print(facts_grid(facts))
    for line in missing:
        console.print(Text(f"missing: {line}", style="yellow"), soft_wrap=True)
    console.print(Text("ready" if not missing else "ready, without what is missing", style="bold green"))


class Stopper:
    """Ctrl-C and SIGTERM: the first stops the run, what comes while it stops is ignored, the third ends the process.

    Python drops what is raised in a destructor or a weak reference's callback: a stop that was, comes again.
    """

    def __init__(self) -> None:
        self.count = 0
        sys.unraisablehook = self._again
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(signum, self)

    def _again(self, dropped: Any) -> None:
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            return sys.__unraisablehook__(dropped)
        self.count = 0
        signal.setitimer(signal.ITIMER_REAL, 0.05)

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
