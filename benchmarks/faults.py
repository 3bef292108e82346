"""Figure: 28 kinds of faults against real jobs; each row of each job is looked for, by key and by text.

    python -m benchmarks.faults --seeds 5 --records runs.jsonl --side-by-side
    python -m benchmarks.faults --kinds "two drivers,poison row" --seeds 20 --records runs.jsonl

A run is one job of a tiny model with one fault, whose kind, place and time a seed picks, until the job is complete (or
refused, where that is right). Then the table is read without the project's code and compared with the table of a run
without faults: rows lost, doubled, altered. `rayinfer verify` must say the same, exit codes must be those documented,
and no engine may be left over. With --records, runs are added to a file, and the table is of all that the file holds.
With --side-by-side, kinds that wait most of their time (for an engine that hangs, for nodes that were lost) run in a
second process, with a Ray of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import fault_cluster
from benchmarks.common import ROOT, describe_machine, table, write_result
from benchmarks.fault_kinds import KINDS
from benchmarks.fault_world import Trial, World, Wrong

COLUMNS = ["kind", "seeds", "on the last commit", "struck", "lost", "doubled", "altered", "wrong", "seconds a run"]
ALL = {**KINDS, **fault_cluster.KINDS}
WAITING = ["hung step", *fault_cluster.KINDS]


def play(world: World, kind: str, seed: int) -> dict[str, Any]:
    """One run of a fault kind; what it came to."""
    trial: Trial = world.trial(kind, seed)
    begin, problem = time.monotonic(), ""
    try:
        ALL[kind](trial)
        trial.end()
    except Wrong as error:
        problem = str(error)
    except Exception:
        problem = traceback.format_exc()
    try:
        trial.end()
    except Wrong as error:
        problem = problem or str(error)
    if not problem:
        trial.clean()
    at = datetime.now(UTC).isoformat(timespec="seconds")
    found = {name: trial.found[name] for name in ("struck", "lost", "doubled", "altered")}
    facts = {"seconds": time.monotonic() - begin, "at": at, "commit": world.commit}
    return {"kind": kind, "seed": seed, **found, "wrong": problem, **facts}


def latest(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last run of each kind and seed."""
    return list({(record["kind"], record["seed"]): record for record in records}.values())


def read(path: Path | None) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []


def summary(records: list[dict[str, Any]]) -> list[list[Any]]:
    rows = []
    last = max(records, key=lambda record: record["at"], default={}).get("commit")
    for kind in ALL:
        some = [record for record in records if record["kind"] == kind]
        if some:
            counts = [sum(record[name] for record in some) for name in ("struck", "lost", "doubled", "altered")]
            wrong, seconds = sum(bool(record["wrong"]) for record in some), sum(record["seconds"] for record in some)
            fresh = sum(record.get("commit") == last for record in some)
            rows.append([kind, len(some), fresh, *counts, wrong, f"{seconds / len(some):.0f}"])
    return rows


def write(records: list[dict[str, Any]]) -> None:
    import ray

    rows = summary(records := latest(records))
    ordered = sorted(records, key=lambda record: record["at"], reverse=True)
    commits = dict.fromkeys(record.get("commit", "unknown") for record in ordered)
    missing = [kind for kind in ALL if kind not in {row[0] for row in rows}]
    text = [
        "# Faults",
        "`python -m benchmarks.faults`: what each kind does, and what a run is, is told there and by `--list`.",
        f"{max(record['at'] for record in records)}, {describe_machine()}, Ray {ray.__version__}",
        f"commits, the last one first: {', '.join(commits)}",
        table(COLUMNS, rows),
        f"{len(rows)} of {len(ALL)} kinds, {sum(row[1] for row in rows)} runs; `struck`: faults that hit. "
        + (f"Not run: {', '.join(missing)}." if missing else ""),
        *(f"- {r['kind']}, seed {r['seed']}: {r['wrong'][:300]}" for r in records if r["wrong"]),
    ]
    write_result("faults.md", "\n\n".join(text))


def main() -> int:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", help="names with commas between, `name:3` for one seed alone; default: all")
    parser.add_argument("--address", help="a Ray that runs: its workers are without hooks, so only drivers are struck")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--records", type=Path, help="a file that runs are added to")
    parser.add_argument("--side-by-side", action="store_true", help="see above; wants --records")
    parser.add_argument("--no-result", action="store_true", help="leave benchmarks/results as it is")
    parser.add_argument("--list", action="store_true", help="show the kinds and end")
    options = parser.parse_args()
    console = Console()
    if options.list:
        for name, function in ALL.items():
            console.print(f"[bold]{name}[/]: {(function.__doc__ or '').strip()}", highlight=False)
        return 0
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    chosen: dict[str, list[int]] = {}
    for name, _, seed in (item.partition(":") for item in (options.kinds.split(",") if options.kinds else ALL)):
        chosen.setdefault(name, []).extend([int(seed)] if seed else seeds)
    if unknown := set(chosen) - set(ALL):
        parser.error(f"unknown kinds {sorted(unknown)}; --list shows them")
    if options.records:
        options.records.parent.mkdir(parents=True, exist_ok=True)
    second = None
    if options.side_by_side:
        if options.records is None or options.address:
            parser.error("--side-by-side: wants --records, for both processes, and no --address")
        names = ",".join(f"{name}:{seed}" for name in WAITING for seed in chosen.pop(name, ()))
        command = [sys.executable, "-m", "benchmarks.faults", "--kinds", names, "--no-result", "--records"]
        second = subprocess.Popen([*command, options.records.resolve()], cwd=ROOT) if names else None
    order = list(ALL)  # those on a cluster come last
    runs = [(kind in fault_cluster.KINDS, seed, order.index(kind)) for kind, some in chosen.items() for seed in some]
    records = read(options.records)
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    world = World(folder, address=options.address or "")
    new = []
    try:
        for _, seed, number in sorted(runs):
            kind = order[number]
            if kind in fault_cluster.KINDS and world.nodes is None:
                world.nodes = fault_cluster.Nodes(world)
            record = play(world, kind, seed)
            new.append(record)
            told = f"{kind}, seed {seed}: {record['wrong'] or 'ok'} ({record['seconds']:.0f} s)"
            console.print(told, markup=False, highlight=False)
            if record["wrong"] and not (options.address or world.nodes):
                world.stop_ray()  # whatever it was, the next run does not begin with it
                world.start_ray()
            if options.records:
                with options.records.open("a") as file:
                    file.write(json.dumps(record) + "\n")
    except BaseException:
        if second:
            second.terminate()
        raise
    finally:
        (world.nodes.end if world.nodes else world.stop_ray)()
        if not any(record["wrong"] for record in new):
            shutil.rmtree(folder, ignore_errors=True)
    failed = bool(second and second.wait()) or any(record["wrong"] for record in new)
    records = read(options.records) or records + new
    shown = Table(*COLUMNS)
    for row in summary(latest(records)):
        shown.add_row(*map(str, row))
    console.print(shown)
    if not (options.address or options.no_result):
        write(records)
    return failed


if __name__ == "__main__":
    sys.exit(main())
