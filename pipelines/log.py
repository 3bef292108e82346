"""The commit log: which parts are the table. A row is done when an entry names its part.

Entry k is the file `_rayinfer/log-<job>/<k>.json`, made by put-if-absent and never changed, so of two drivers that have
both seen the entries before k only one appends k; the other stops. That gives three rules:

- A driver begins with an entry of its own. Whoever wrote before it cannot append any more, knowing less than it must.
- A part's name holds the job and the number of its driver's first entry (the epoch). A driver removes parts that no
  entry names only of its own epoch and of earlier ones, whose drivers cannot name them any more.
- An entry whose rows are all new is appended; `done` tells which are.

Nothing else is needed for a driver to die at any point: entries are the truth, and other parts are garbage.
"""

import contextlib
import json
import os
import platform
import re
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, NoReturn

import psutil

from rayinfer.errors import ConfigError
from rayinfer.pipelines.keys import KeyDigest, RowSet, unpack_rows
from rayinfer.pipelines.store import META, Store, claim

PART_PREFIX = "part-"
LEASE = f"{META}/driver.json"
NUM_READ_THREADS = 16
_READ_AT_ONCE = 1000
_PART_NAME = re.compile(rf"{PART_PREFIX}([0-9a-f]{{8}})-([0-9]{{6}})-")


class OutputTakenError(RuntimeError):
    """Another driver is writing to this output; this one has stopped and changed nothing since."""


@dataclass
class Part:
    """One file of the table. Its rows stand in the order of their numbers."""

    name: str
    num_rows: int
    num_bytes: int
    sha256: str
    keys: str  # hex of the KeyDigest
    rows: str  # numbers of its rows, see keys.pack_rows
    errors: dict[str, int]
    num_input_tokens: int
    num_generated_tokens: int
    num_cached_tokens: int


class CommitLog:
    """The entries of one job, and what they add up to.

    Memory: a bit a row, and about 1 KB a part.

    Raises:
        ConfigError: from `load`, an entry is missing or damaged.
        OutputTakenError: from `start`, `commit`, `replay` and `end`.
    """

    def __init__(self, store: Store, job_id: str, num_rows: int):
        self.store, self.job_id = store, job_id
        self.folder = f"{META}/log-{job_id}"
        self.done = RowSet(num_rows)
        self.parts: dict[str, Part] = {}
        self.length, self.num_replays, self.epoch = 0, 0, -1
        self._driver = uuid.uuid4().hex

    def load(self) -> None:
        """Read the entries that are there."""
        names = sorted(name for name in self.store.sizes(self.folder) if not name.endswith("/"))
        with ThreadPoolExecutor(NUM_READ_THREADS) as pool:
            for k in range(0, len(names), _READ_AT_ONCE):
                some = [self._name(i) for i in range(k, min(k + _READ_AT_ONCE, len(names)))]
                try:
                    for data in pool.map(self.store.read, some):
                        self._apply(json.loads(data))
                except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
                    text = f"{self.folder}: an entry is missing or damaged ({error}); give --overwrite to start afresh"
                    raise ConfigError(text) from None

    @property
    def num_missing(self) -> int:
        return self.done.num_rows - self.done.count

    @property
    def part_prefix(self) -> str:
        """What the names of this driver's parts begin with."""
        return f"{PART_PREFIX}{self.job_id}-{self.epoch:06d}-"

    def digest(self) -> KeyDigest:
        """Of the keys of all rows that are done."""
        total = KeyDigest()
        for part in self.parts.values():
            total.merge(KeyDigest(part.num_rows, int(part.keys, 16)))
        return total

    def start(self) -> None:
        """Make this driver the only one that can append."""
        self._append("start")
        self.epoch = self.length - 1  # the number of that entry

    def check_last(self) -> None:
        """Raises OutputTakenError if another driver has appended an entry."""
        if self.store.size(self._name(self.length)) is not None:
            self._taken()

    def commit(self, parts: list[Part]) -> None:
        """Add parts with rows that are not done. Raises FileNotFoundError if the driver does not see them."""
        for part in parts:
            if self.store.size(part.name) != part.num_bytes:
                self.check_last()  # else it was garbage
                text = "a worker wrote it, but the driver does not see it; name a folder that all nodes share"
                raise FileNotFoundError(f"{part.name}: {text}")
        self._append("commit", add=parts)

    def failed(self) -> list[str]:
        """Parts of failed rows."""
        return [name for name, part in self.parts.items() if part.errors]

    def replay(self) -> None:
        """Take the parts of failed rows out."""
        if failed := self.failed():
            self._append("replay", remove=failed)

    def end(self) -> None:
        """Say that all is done."""
        self._append("end")

    def garbage(self) -> list[str]:
        """Parts that no entry names, and that none can name any more."""
        others = filter(None, (_PART_NAME.match(name) for name in self.store.sizes() if name not in self.parts))
        return [part.string for part in others if part[1] == self.job_id and int(part[2]) <= self.epoch]

    def _name(self, number: int) -> str:
        return f"{self.folder}/{number:08d}.json"

    def _append(self, kind: str, add: Iterable[Part] = (), remove: Iterable[str] = ()) -> None:
        entry: dict[str, Any] = {"kind": kind, "driver": self._driver, "number": self.length, "remove": list(remove)}
        entry |= {"at": datetime.now(UTC).isoformat(timespec="seconds"), "add": [asdict(part) for part in add]}
        if not claim(self.store, self._name(self.length), json.dumps(entry).encode()):
            self._taken()
        self._apply(entry)

    def _taken(self) -> NoReturn:
        name = self._name(self.length)
        raise OutputTakenError(f"another driver is writing to this output (it made {name}); this one has stopped")

    def _apply(self, entry: dict[str, Any]) -> None:
        if entry["number"] != self.length:
            raise ValueError(f"it says number {entry['number']}")
        for name in entry["remove"]:
            self.done.discard(unpack_rows(self.parts.pop(name).rows))
        for part in (Part(**fields) for fields in entry["add"]):
            rows = unpack_rows(part.rows)
            if len(rows) != part.num_rows or self.done.has(rows).any():
                raise ValueError(f"rows of {part.name} are there twice")
            self.done.add(rows)
            # Row numbers are needed again only to take failed rows out.
            self.parts[part.name] = part if part.errors else Part(**{**asdict(part), "rows": ""})
        self.num_replays += entry["kind"] == "replay"
        self.length += 1


def part_ids(names: Iterable[str]) -> set[str]:
    """Ids of the jobs that wrote these parts."""
    return {match[1] for match in map(_PART_NAME.match, names) if match}


class Lease:
    """Says which process is at work, so that a second one on this machine stops instead of ending the first.

    It is a courtesy; what keeps the table exact is the log. Of a process elsewhere nobody can say whether it lives: the
    new driver takes over, and the old one stops at its next commit.
    """

    def __init__(self, store: Store):
        self._store = store
        self._me = {"host": platform.node(), "pid": os.getpid(), "since": psutil.Process().create_time()}

    def check(self) -> None:
        """Raises OutputTakenError if a driver lives on this machine."""
        try:
            holder = json.loads(self._store.read(LEASE))
            since = psutil.Process(holder["pid"]).create_time() if holder["host"] == self._me["host"] else 0.0
        except (OSError, ValueError, KeyError, TypeError, psutil.Error):
            return
        if since == holder["since"]:
            raise OutputTakenError(f"another driver is writing to this output: process {holder['pid']} of this machine")

    def __enter__(self) -> None:
        try:
            self._store.put(LEASE, json.dumps(self._me).encode())
        except Exception:  # maybe after it was written: this process, which lives, would not get past it again
            self.__exit__()
            raise

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError, ValueError):
            if json.loads(self._store.read(LEASE)) == self._me:
                self._store.remove([LEASE])
