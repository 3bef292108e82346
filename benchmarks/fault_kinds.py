"""The fault kinds. Each is a function of a Trial; its seed says where the fault strikes, and which variant of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.fault_world import NUM_FILES, NUM_ROWS, Trial, Wrong

POISON = "zqx"  # a word that no other row holds
Kind = Callable[[Trial], None]
KINDS: dict[str, Kind] = {}


def kind(name: str, kinds: dict[str, Kind] = KINDS) -> Callable[[Kind], Kind]:
    def add(function: Kind) -> Kind:
        kinds[name] = function
        return function

    return add


def at(seam: str, passages: Any, do: str, **more: Any) -> dict[str, Any]:
    """A fault as fault_hooks.py reads it."""
    return {"seam": seam, "at": passages, "do": do, **more}


# Workers and engines


def some_step(t: Trial, first: int = 1) -> int:
    """A step that any run comes to: how many there are varies with how rows happen to meet."""
    return t.pick.randint(first, max(first, t.world.passages["step"] // 2))


@kind("worker killed at a step")
def worker_killed(t: Trial) -> None:
    """SIGKILL for the process of the engine (even seeds) or the Ray worker over it (odd), at a random step."""
    expected = t.world.expected()
    t.strike(at("step", [some_step(t)], ("kill", "kill-actor")[t.seed % 2]))
    t.run()
    t.reconcile(expected, strikes=1)


@kind("worker killed at a seam of the commit")
def writer_killed(t: Trial) -> None:
    """SIGKILL for a worker that writes a part: before, in the middle of or after the write."""
    expected = t.world.expected()
    # In the first half: how many parts there are varies with how rows meet.
    t.strike(at("store", [t.pick.randint(1, max(1, t.world.passages["worker"] // 2))], "kill", role="worker"))
    t.run()
    t.reconcile(expected, strikes=1)


@kind("storm of kills")
def storm(t: Trial) -> None:
    """SIGKILL for six workers of the job, whichever, at random times."""
    expected = t.world.expected()
    driver = t.start()
    for _ in range(6):
        time.sleep(t.pick.uniform(0, t.world.usual / 4))
        workers = [process for process in t.world.workers() if not is_rays_own(process)]
        if driver.running and workers:
            t.pick.choice(workers).kill()
            t.found["struck"] += 1
    t.check_code(driver, (0, 1))
    if driver.code:
        t.resume()
    t.reconcile(expected, strikes=1)


def is_rays_own(process: psutil.Process) -> bool:
    """Ray's agents, without which a raylet ends, and an actor of its own that all jobs share."""
    try:
        return any(word in process.cmdline()[0] for word in ("Agent", "Coordinator"))
    except (psutil.Error, IndexError):
        return True


@kind("GPU out of memory")
def out_of_memory(t: Trial) -> None:
    """torch.OutOfMemoryError from one to three random steps."""
    expected = t.world.expected()
    steps = [some_step(t) for _ in range(1 + t.seed % 3)]
    t.strike(at("step", steps, "out-of-memory"))
    t.run()
    t.reconcile(expected, strikes=1)


@kind("CUDA error")
def cuda_error(t: Trial) -> None:
    """RuntimeError: CUDA error, from one random step; the engine cannot go on."""
    expected = t.world.expected()
    t.strike(at("step", [some_step(t)], "cuda"))
    t.run()
    t.reconcile(expected, strikes=1)


def write_poisoned(t: Trial, number: int) -> tuple[str, list[str]]:
    """The table with POISON in some rows' texts; returns its folder and the keys of these rows."""
    rows = t.pick.sample(range(NUM_ROWS), number)
    folder = t.world.folder / f"{t.name}-in"
    folder.mkdir()
    for i in range(NUM_FILES):
        texts = [f"row {k} {POISON}" if k in rows else f"row {k}" for k in range(i, NUM_ROWS, NUM_FILES)]
        pq.write_table(pa.table({"text": texts}), folder / f"{i}.parquet")
    return folder.name, [f"{k % NUM_FILES}.parquet#{k // NUM_FILES}" for k in rows]


@kind("NaN logits")
def nan_logits(t: Trial) -> None:
    """NaN in the logits of one to three rows: these fail, their neighbours do not."""
    expected = t.world.expected()
    source, keys = write_poisoned(t, 1 + t.seed % 3)
    t.strike(at("forward", "all", "nan", poison=POISON))
    t.run(source=source)
    t.reconcile(expected, dict.fromkeys(keys, "NAN_LOGITS"), strikes=1)


@kind("hung step")
def hung_step(t: Trial) -> None:
    """A step that sleeps for an hour (even seeds), or an engine that is stopped by SIGSTOP (odd).

    From the third on: the first steps of a process are given ten minutes, longer than a run here may take.
    """
    expected = t.world.expected()
    t.strike(at("step", [some_step(t, first=3)], ("sleep", "stop")[t.seed % 2], seconds=3600.0))
    t.run()
    t.reconcile(expected, strikes=1)


@kind("poison row")
def poison_row(t: Trial) -> None:
    """A row that kills every engine that meets it: a segmentation fault, exit, SIGKILL."""
    expected = t.world.expected()
    source, keys = write_poisoned(t, 1)
    t.strike(at("step", "all", ("segv", "exit", "kill")[t.seed % 3], poison=POISON))
    t.run(source=source)
    t.reconcile(expected, dict.fromkeys(keys, "ENGINE_CRASH"), strikes=1)


# Drivers


@kind("driver killed at a random point")
def driver_killed(t: Trial) -> None:
    """SIGKILL for one to five drivers at random times; then the same command runs to its end."""
    expected = t.world.expected()
    for _ in range(1 + t.seed % 5):
        driver = t.start(once=True)
        time.sleep(t.pick.uniform(0, 1.1 * t.world.usual))
        if not driver.running:
            break
        driver.kill()
        driver.wait()
        t.found["struck"] += 1
    t.run()
    t.reconcile(expected)


@kind("driver killed at a seam of the commit")
def driver_killed_at_seam(t: Trial) -> None:
    """SIGKILL for one to five drivers: before, in the middle of or after any write of theirs to the output."""
    expected = t.world.expected()
    for _ in range(1 + t.seed % 5):
        t.strike(at("store", [t.pick.randint(1, t.world.passages["driver"])], "kill", role="driver"))
        driver = t.run(want=(0, -signal.SIGKILL))
        if driver.code == 0:  # it had fewer writes left than that
            break
    t.strike()
    t.run()
    t.reconcile(expected)


@kind("two drivers")
def two_drivers(t: Trial) -> None:
    """A second driver on the same output: it stops (even seeds), or takes over, as if on another machine (odd)."""
    expected = t.world.expected()
    first = t.start()
    t.wait_commits(t.pick.randint(0, 4), first)
    lease = t.out / "_rayinfer" / "driver.json"
    t.wait_for(lambda: lease.exists() or not first.running, "the lease", first)
    if t.seed % 2:
        holder = json.loads(lease.read_text()) if lease.exists() else {}
        lease.write_text(json.dumps({**holder, "host": "another machine"}))
    second = t.start()
    codes = first.wait(), second.wait()
    if set(codes) - {0, 1} or 0 not in codes:
        raise Wrong(f"exit codes {codes}: {first.told()[-600:]} {second.told()[-600:]}")
    for driver, code in zip((first, second), codes, strict=True):
        if code == 1 and "another driver" not in driver.told():
            raise Wrong(f"a driver stops without the reason: {driver.told()[-800:]}")
    t.found["struck"] += 1 in codes
    t.reconcile(expected)


@kind("Ctrl-C or SIGTERM")
def stopped(t: Trial) -> None:
    """SIGINT (even seeds) or SIGTERM (odd) at a random time: the driver ends by itself, the same command goes on."""
    expected = t.world.expected()
    driver = t.start(once=True)
    time.sleep(t.pick.uniform(0.5, t.world.usual))
    driver.kill((signal.SIGINT, signal.SIGTERM)[t.seed % 2])
    t.check_code(driver, (0, 130))
    t.found["struck"] += driver.code == 130
    t.wait_for(lambda: not t.world.engines(), "the end of the engines", driver)
    t.run()
    t.reconcile(expected)


# The job


def copy_whole(t: Trial) -> tuple[dict[str, str], dict[str, tuple[int, bytes]]]:
    """A complete output to begin with; returns what is expected, and its files as they are."""
    expected = t.world.expected()
    shutil.copytree(t.world.whole.out, t.out)
    return expected, files(t.out)


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


@kind("rerun after success")
def rerun(t: Trial) -> None:
    """The same command again, `run --strict` or `replay`: nothing is done, nothing changes."""
    expected, before = copy_whole(t)
    if t.seed % 3 == 2:
        driver = t.run(command=("replay", t.out))
    else:
        driver = t.run(*["--strict"][: t.seed % 3])
    if "nothing to do" not in driver.told() or files(t.out) != before:
        raise Wrong(f"not a no-op: {driver.told()[-600:]}")
    t.found["struck"] += 1
    t.reconcile(expected)


def refused(t: Trial, field: str, **parts: Any) -> None:
    expected, before = copy_whole(t)
    driver = t.run(want=2, **parts)
    if field not in driver.told() or "--overwrite" not in driver.told() or files(t.out) != before:
        raise Wrong(f"not refused as it should be: {driver.told()[-800:]}")
    t.found["struck"] += 1
    t.reconcile(expected)


@kind("changed prompt")
def changed_prompt(t: Trial) -> None:
    """Another prompt over the same output is refused, by name; the table stays."""
    prompt = t.pick.choice(
        ["Tell: {{ text }}", "Say: {{ text }} ", "Say:\n{{ text }}", "say: {{ text }}", "{{ text }}"]
    )
    refused(t, "prompt", prompt=prompt)


@kind("changed model")
def changed_model(t: Trial) -> None:
    """Another model, or a changed file of the model, is refused."""
    model = dict(t.world.job("")["model"])
    if t.seed % 2:
        model["model_source"] = "other-model"
    else:
        changed = t.world.folder / f"{t.name}-model"
        shutil.copytree(t.world.folder / "model", changed)
        file = changed / t.pick.choice(["config.json", "tokenizer.json", "tokenizer_config.json"])
        file.write_text(file.read_text() + "\n")
        model["model_source"] = changed.name
    refused(t, "model", model=model)


@kind("changed sampling")
def changed_sampling(t: Trial) -> None:
    """Other sampling parameters are refused."""
    sampling = t.world.job("")["sampling"]
    change = t.pick.choice([{"temperature": 0.5}, {"max_tokens": 9}, {"seed": 7}, {"top_p": 0.9}, {"stop": ["."]}])
    refused(t, f"sampling.{next(iter(change))}", sampling={**sampling, **change})


# Storage


def until_whole(t: Trial, expected: dict[str, str], **parts: Any) -> None:
    """A driver under the fault may come through, stop, or refuse a folder that it cannot write when it begins; without
    the fault the same command makes the table whole."""
    driver = t.run(want=(0, 1, 2), **parts)
    if driver.code == 2 and "the folder cannot be written" not in driver.told():
        raise Wrong(f"refused for another reason: {driver.told()[-600:]}")
    if driver.code == 1 and "to go on, type" not in driver.told():
        raise Wrong(f"no way to go on is told: {driver.told()[-600:]}")
    t.strike()
    if driver.code:
        t.run(**parts)
    t.reconcile(expected, strikes=1)


def from_on(t: Trial, seam: str, do: str) -> dict[str, Any]:
    """A fault of the output from a random write on: of a worker's (even seeds) or the driver's (odd); every third
    seed, one that passes."""
    role = ("worker", "driver")[t.seed % 2]
    # Three seams a write, and the first half: runs differ in how many parts they write.
    first = t.pick.randint(1, max(1, t.world.passages[role] // 6))
    return at(seam, list(range(first, first + (2 if t.seed % 3 == 2 else 5000))), do, role=role)


@kind("disk full")
def disk_full(t: Trial) -> None:
    """ENOSPC in the middle of a write, at a random write and all after it; then there is room again."""
    expected = t.world.expected()
    t.strike(from_on(t, "store.torn", "ENOSPC"))
    until_whole(t, expected)


@kind("permission lost")
def permission_lost(t: Trial) -> None:
    """EACCES at a random write and all after it; then the permission is back."""
    expected = t.world.expected()
    t.strike(from_on(t, "store.before", "EACCES"))
    until_whole(t, expected)


@kind("flaky file system")
def flaky(t: Trial) -> None:
    """One write to a bucket in six fails, before it was done or (odd seeds) after: an error for a success."""
    expected = t.world.expected()
    first = t.pick.randint(1, 6)  # of a process: with chance alone, a job of few writes may meet none
    passages = [i for i in range(1, 2000) if t.pick.random() < 1 / 6 or i == first]
    t.strike(at(("bucket", "bucket.after")[t.seed % 2], passages, "EIO"))
    until_whole(t, expected, out=f"s3://{t.out}")


@kind("slow file system")
def slow(t: Trial) -> None:
    """Each write to a bucket takes up to a second."""
    expected = t.world.expected()
    t.strike(at("bucket", "all", "sleep", seconds=t.pick.uniform(0.1, 0.5)))
    t.run(out=f"s3://{t.out}")
    t.reconcile(expected, strikes=1)


# The source


@kind("truncated Parquet")
def truncated(t: Trial) -> None:
    """A file cut at a random byte: before the job it is refused (even seeds), during the job (odd) the job stops."""
    expected = t.world.expected()
    source, _ = write_poisoned(t, 0)
    file = t.world.folder / source / f"{t.pick.randrange(NUM_FILES)}.parquet"
    data, state = file.read_bytes(), file.stat()
    cut = data[: t.pick.randrange(len(data))]
    if t.seed % 2 == 0:
        file.write_bytes(cut)
        driver = t.run(want=2, source=source)
        if file.name not in driver.told() or list(t.out.glob("part-*")):
            raise Wrong(f"not refused by name: {driver.told()[-600:]}")
        t.found["struck"] += 1
        return
    driver = t.start(source=source)
    job = t.out / "_rayinfer" / "job.json"
    t.wait_for(lambda: job.exists() or not driver.running, "the job's beginning", driver)
    file.write_bytes(cut)
    t.check_code(driver, (0, 1))
    t.found["struck"] += driver.code
    file.write_bytes(data)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    t.run(source=source)
    t.reconcile(expected)


@kind("bad JSONL line")
def bad_line(t: Trial) -> None:
    """One to four lines that are cut, no object, or no UTF-8: each costs its row."""
    lines = [json.dumps({"text": f"row {k}"}).encode() for k in range(NUM_ROWS)]
    good = t.world.folder / "in-lines"
    good.mkdir(exist_ok=True)
    if not (good / "rows.jsonl").exists():
        (good / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    expected = t.world.expected(source="in-lines")
    rows = t.pick.sample(range(NUM_ROWS), 1 + t.seed % 4)
    for k in rows:
        lines[k] = t.pick.choice([lines[k][: t.pick.randint(1, 12)], b"[1, 2]", b"17", b'{"text": "\xff\xfe"}', b"{}}"])
    folder = t.world.folder / f"{t.name}-in"
    folder.mkdir()
    (folder / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    t.found["struck"] += len(rows)
    t.run(source=folder.name)
    t.reconcile(expected, {f"rows.jsonl#{k}": "INVALID_PROMPT" for k in rows})


@kind("schema drift")
def schema_drift(t: Trial) -> None:
    """A column that other files lack, or have with another type: widened and whole, or refused by name."""
    expected = t.world.expected()
    source, _ = write_poisoned(t, 0)
    texts = [pq.read_table(t.world.folder / source / f"{i}.parquet") for i in range(NUM_FILES)]
    small, wide = pa.array(range(len(texts[0])), pa.int32()), pa.array(range(2**40, 2**40 + len(texts[0])))
    words, missing = pa.array(["x"] * len(texts[0])), None
    drift = [(missing, words), (small, wide), (words, missing), (small, words), (wide, small)][t.seed % 5]
    for i, column in enumerate(drift):
        table = texts[i] if column is None else texts[i].append_column("n", column)
        pq.write_table(table, t.world.folder / source / f"{i}.parquet")
    t.found["struck"] += 1
    driver = t.run(want=(0, 2), source=source)
    if driver.code == 0:
        t.reconcile(expected)
        kept = sorted(map(str, pq.read_table(list(t.out.glob("part-*")))["n"].to_pylist()))
        given = [value for i, c in enumerate(drift) for value in (c.to_pylist() if c else [None] * len(texts[i]))]
        if kept != sorted(map(str, given)):
            raise Wrong("values of the column were changed")
    elif "'n'" not in driver.told() or ".parquet" not in driver.told() or list(t.out.glob("part-*")):
        raise Wrong(f"not refused by name: {driver.told()[-600:]}")


@kind("user functions")
def user_functions(t: Trial) -> None:
    """preprocess or postprocess raises, returns None, or blocks for some seconds, at random rows."""
    expected = t.world.expected()
    rows = t.pick.sample(range(NUM_ROWS), 3)
    mode = ("raise", "none", "block")[t.seed % 3]
    stage = ("preprocess", "postprocess")[t.seed // 3 % 2]
    t.out.mkdir()
    t.found["struck"] += len(rows)
    numbers = ",".join(map(str, rows))
    call = ("call", "benchmarks.fault_kinds:run_with_functions", t.world.folder, t.out, mode, stage, numbers)
    t.run(command=call)
    keys = [f"{k % NUM_FILES}.parquet#{k // NUM_FILES}" for k in rows]
    failed = {} if mode == "block" else dict.fromkeys(keys, f"{stage.upper()}_ERROR")
    t.reconcile(expected, failed, by_log=False)


def run_with_functions(folder: str, out: str, mode: str, stage: str, numbers: str) -> None:
    """In a driver: the job's rows through build_processor, as one part file."""
    import ray.data

    from rayinfer.processors import EngineProcessorConfig, build_processor

    bad = {f"row {number}" for number in numbers.split(",")}

    def fault(row: dict[str, Any], where: str) -> Any:
        if where == stage and row["text"] in bad:
            if mode == "raise":
                raise KeyError("no such thing")
            if mode == "none":
                return None
            time.sleep(5)
        return row if where == "postprocess" else {"prompt": f"Say: {row['text']}"}

    rows = []
    for i in range(NUM_FILES):
        texts = range(i, NUM_ROWS, NUM_FILES)
        rows += [{"row_key": f"{i}.parquet#{number}", "text": f"row {k}"} for number, k in enumerate(texts)]
    config = EngineProcessorConfig(
        model_source=f"{folder}/model",
        engine_kwargs={"max_model_len": 128, "max_num_seqs": 8, "cpu_kv_cache_gib": 0.01, "num_threads": 1},
        sampling_params={"temperature": 0, "max_tokens": 24},
    )
    processor = build_processor(
        config, preprocess=lambda row: fault(row, "preprocess"), postprocess=lambda row: fault(row, "postprocess")
    )
    answers = processor(ray.data.from_items(rows, override_num_blocks=4)).to_pandas()
    names = ["row_key", "text", "generated_text", "finish_reason", "num_input_tokens", "num_generated_tokens"]
    pq.write_table(pa.Table.from_pandas(answers[[*names, "error_type"]]), f"{out}/part-0.parquet")
