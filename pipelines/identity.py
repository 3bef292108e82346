"""What makes a job the same job: `_rayinfer/job.json` says it, and a run that differs in one field is refused."""

import hashlib
import json
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rayinfer.errors import ConfigError, bare_uri
from rayinfer.pipelines.job import JobSpec, resolve_uri
from rayinfer.pipelines.log import part_ids
from rayinfer.pipelines.sources import Census, Listing
from rayinfer.pipelines.store import META, Store, claim, open_store

JOB = f"{META}/job.json"
FORMAT = 2  # of log and parts; a version that writes rows in another way has another number. 1: no error_stage
FORMATS = (1, 2)  # that this version goes on with
MAX_SHOWN = 8
_SHOWN_CHARS = 60

# How a replica works, not what it answers: a job may go on with more memory or on another machine.
_FREE = {"device", "max_num_seqs", "max_num_batched_tokens", "block_size", "gpu_memory_utilization", "num_threads"}
_FREE |= {"num_gpu_blocks_override", "cpu_kv_cache_gib", "enable_prefix_caching", "fuse", "enforce_eager"}
_FREE |= {"prefill_backend", "decode_backend"}
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx")
_HASHED_BYTES = 2**20  # of a .gguf file's head, which holds the configuration and the tokenizer, and of weights' ends
END = "sha256 of the end"


def fingerprint(spec: JobSpec, listing: Listing) -> dict[str, Any]:
    """Field by field, what the rows of the output depend on; fields that have their default are left out."""
    source = spec.source.model_dump(exclude_defaults=True, exclude={"catalog"}) | {"uri": bare_uri(spec.source.uri)}
    engine = spec.model.model_dump(exclude_defaults=True, exclude=_FREE)
    tree: dict[str, Any] = {
        "format": FORMAT,
        "source": source | {"files": {name: f"{size:,} bytes, {tag}" for name, (size, tag) in listing.tags.items()}},
        "prompt": spec.prompt, "messages": [message.model_dump() for message in spec.messages or ()],
        "model": engine | {"files": _model_files(spec.model.model)},
        "tokenizer": {"files": _model_files(spec.model.tokenizer)} if spec.model.tokenizer is not None else None,
        "sampling": spec.sampling.model_dump(exclude_defaults=True),
        "sink": spec.sink.model_dump(exclude_defaults=True, include={"format", "table", "columns"}),
    }  # fmt: skip
    return dict(_flat("", {key: item for key, item in tree.items() if item is not None and item != []}))


def _flat(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = {str(i): item for i, item in enumerate(value)}
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(f"{place}.{key}" if place else str(key), item)
    else:
        yield place, "null" if value is None else json.loads(json.dumps(value, default=str))


def _model_files(source: str) -> dict[str, str]:
    """Sizes of a local model's files, hashes of them or of weights' ends. A hub id's files are its revision's."""
    path = Path(source).expanduser()
    files = [path] if path.is_file() else sorted(file for file in path.glob("*") if file.is_file())
    told = {}
    for file in files:
        size, weights = file.stat().st_size, file.suffix in _WEIGHTS
        with file.open("rb") as f:
            head = f.read(_HASHED_BYTES) if file.suffix == ".gguf" else b"" if weights else f.read()
            f.seek(max(0, size - _HASHED_BYTES))
            end = f.read() if weights else b""  # their size stays when a model is trained further
        told[file.name] = f"{size:,} bytes"
        told[file.name] += f", sha256 {hashlib.sha256(head).hexdigest()[:16]}" if head else ""
        told[file.name] += f", {END} {hashlib.sha256(end).hexdigest()[:16]}" if end else ""
    return told


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A line for each field that differs, with both values."""
    pairs = {name: (old.get(name), new.get(name)) for name in sorted({*old, *new})}
    # Earlier versions did not look at the ends of weights.
    other = {name: pair for name, pair in pairs.items() if not f"{pair[1]}, {END} ".startswith(f"{pair[0]}, {END} ")}
    lines = [f"{name}: {_show(a, b)} -> {_show(b, a)}" for name, (a, b) in other.items()]
    return lines[:MAX_SHOWN] + ([f"and {len(lines) - MAX_SHOWN} more"] if len(lines) > MAX_SHOWN else [])


def _show(value: Any, other: Any) -> str:
    if value is None:
        return "nothing"
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) > _SHOWN_CHARS and isinstance(other, str):  # from where they begin to differ
        same = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), 0)
        text = "..." * (same > 10) + text[max(same - 10, 0) :]
    return repr(text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "...")


def read_job(store: Store) -> dict[str, Any] | None:
    """The job that the folder holds, or None.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        job = json.loads(store.read(JOB))
        if {"id", "fingerprint", "census", "replaces"} <= set(job):
            return job
    except FileNotFoundError:
        return None
    except ValueError:
        pass
    raise ConfigError(f"{JOB} is damaged; start afresh with --overwrite, or name another folder")


def need_job(store: Store, uri: str) -> dict[str, Any]:
    """The job that the folder at `uri` holds. Raises ConfigError if there is none, or the file is damaged."""
    if (job := read_job(store)) is None:
        raise ConfigError(f"{uri!r}: no {JOB} there, so no output of a job")
    return job


def check_same(job: dict[str, Any], new: dict[str, Any], uri: str) -> None:
    """Raise ConfigError, naming what differs, unless `new` is the fingerprint of the job that is there."""
    if lines := differences(job["fingerprint"], new):
        head = f"sink.uri = {bare_uri(uri)!r} holds another job; what was there -> what is asked for:"
        end = "give --overwrite to replace that table, or name another folder"
        raise ConfigError("\n  ".join([head, *lines]) + f"\n{end}")


def claim_job(store: Store, spec: JobSpec, fingerprint: dict[str, Any], census: Census) -> dict[str, Any]:
    """Make `job.json` if there is none; returns the one that is there then."""
    logs = {name.removeprefix("log-").rstrip("/") for name in store.sizes(META) if name.startswith("log-")}
    public = spec.model_dump(mode="json", exclude_unset=True)
    for place in (it for part in ("source", "sink") for it in (public[part], public[part].get("catalog") or {})):
        place |= {"uri": bare_uri(place["uri"])} if place.get("uri") else {}
    job = {
        "id": uuid.uuid4().hex[:8], "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "replaces": sorted(part_ids(store.sizes()) | logs), "fingerprint": fingerprint, "job": public,
        "census": census.pack(),
    }  # fmt: skip
    if claim(store, JOB, json.dumps(job).encode()):
        return job
    if (there := read_job(store)) is None:
        raise RuntimeError(f"{JOB} was made and removed by another driver; run the same command again")
    check_same(there, fingerprint, spec.sink.uri)
    return there


def recall_job(uri: str) -> JobSpec:
    """The job whose output is at `uri`, as its `job.json` has it.

    Raises:
        ConfigError: there is none.
    """
    uri = resolve_uri(uri, ".")
    job = need_job(open_store(uri), uri)
    return JobSpec.parse({**job["job"], "sink": {**job["job"]["sink"], "uri": uri}}, place=JOB)
