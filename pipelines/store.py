"""The output folder, on a local disk or in an object store: files that appear whole, and put-if-absent.

Put-if-absent is what the commit log stands on: of all writers of one name exactly one wins, and what it wrote stays.
A local disk has it in link(2), which fails for a name that exists (NFS too); S3, GCS and Azure in conditional puts.
"""

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Iterable
from typing import Any

import fsspec

from rayinfer.errors import ConfigError

META = "_rayinfer"  # what is not the table: readers leave out folders that begin with an underscore
RETRY_SECONDS = (0.0, 0.5, 2.0, 5.0)
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "memory"}
_MEMORY_LOCK = threading.Lock()  # fsspec's memory looks for a name and then writes it: two steps


class Store:
    """One folder of an object store; names are relative to it. Methods raise what the store's client raises."""

    def __init__(self, fs: Any, folder: str):
        self.fs, self.folder = fs, folder

    def put(self, name: str, data: bytes) -> None:
        """Write a file that no reader sees half of; one of that name is replaced."""
        self.fs.pipe_file(f"{self.folder}/{name}", data)

    def create(self, name: str, data: bytes) -> None:
        """Write a file; raises FileExistsError, and changes nothing, if there is one of that name."""
        with _MEMORY_LOCK if "memory" in _protocols(self.fs) else contextlib.nullcontext():
            self.fs.pipe_file(f"{self.folder}/{name}", data, mode="create")

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError."""
        return self.fs.cat_file(f"{self.folder}/{name}")

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if there is none."""
        self.fs.invalidate_cache()
        try:
            return self.fs.size(f"{self.folder}/{name}")
        except FileNotFoundError:
            return None

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Names and bytes of the files right in a folder; names of folders in it end with "/".

        Left out are names that begin with a dot, and the empty objects that stand for folders in a bucket's console.
        """
        path = f"{self.folder}/{folder}".rstrip("/")
        self.fs.invalidate_cache()
        try:
            infos = self.fs.ls(path, detail=True)
        except FileNotFoundError:
            return {}
        infos = [info for info in infos if info["type"] == "directory" or not info["name"].endswith("/")]
        names = ((info["name"].rstrip("/").rpartition("/")[2], info) for info in infos)
        return {n + "/" * (i["type"] == "directory"): i["size"] or 0 for n, i in names if n[:1] not in ("", ".")}

    def remove(self, names: Iterable[str]) -> None:
        """Remove files, and folders whose names end with "/", in this order; those that are gone are no error."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm(f"{self.folder}/{name}".rstrip("/"), recursive=name.endswith("/"))


class LocalStore(Store):
    """A folder on a disk, or on a file system that is mounted like one."""

    def put(self, name: str, data: bytes) -> None:
        self._place(name, data, os.replace)

    def create(self, name: str, data: bytes) -> None:
        self._place(name, data, os.link)

    def _place(self, name: str, data: bytes, move: Any) -> None:
        """Write aside, bring it to the disk, move it to its name, and bring the name to the disk."""
        path, aside = f"{self.folder}/{name}", f"{self.folder}/{META}/tmp/{uuid.uuid4().hex}"
        os.makedirs(os.path.dirname(aside), exist_ok=True)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            with open(aside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            move(aside, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(aside)
        folder = os.open(os.path.dirname(path), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def claim(store: Store, name: str, data: bytes) -> bool:
    """Put-if-absent with a sure answer: whether it is `data`, of which no two are alike, that stands under the name.

    A store may report an error, or that the name is taken, although (an earlier try of) this put came through.

    Raises:
        Exception: of the store, when nothing stands under the name, or cannot be read, after a few tries.
    """
    error: Exception = OSError(f"{name}: the store neither takes nor has it")
    for seconds in RETRY_SECONDS:
        time.sleep(seconds)
        try:
            store.create(name, data)
            return True
        except FileExistsError:
            pass
        except Exception as problem:  # each store's client has errors of its own
            error = problem
        try:
            return store.read(name) == data
        except Exception as problem:
            error = error if isinstance(problem, FileNotFoundError) else problem
    raise error


def open_store(uri: str) -> Store:
    """Open the folder that `uri` names; nothing is written.

    Raises:
        ConfigError: no such kind of URI, or a store without put-if-absent.
    """
    try:
        fs, path = fsspec.core.url_to_fs(uri)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"uri = {uri!r}: {error}") from None
    protocols = _protocols(fs)
    if protocols & {"file", "local"}:
        return LocalStore(fs, path.rstrip("/"))
    if protocols & _OBJECT_STORES:
        return Store(fs, path.rstrip("/"))
    text = f"no put-if-absent is known for {'/'.join(sorted(protocols))}, and rows could be lost without"
    raise ConfigError(f"uri = {uri!r}: {text}; use a local or mounted folder, s3, gs or abfs")


def _protocols(fs: Any) -> set[str]:
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
