"""A bucket for the fault runs: what the stores use of an S3 client, kept in a folder that all processes share."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import uuid
from pathlib import Path
from typing import Any

import fsspec


def strike(seam: str) -> None:
    if "sitecustomize" in sys.modules and hasattr(sys.modules["sitecustomize"], "strike"):
        sys.modules["sitecustomize"].strike(seam)


class DiskBucket(fsspec.AbstractFileSystem):
    """`s3://<absolute path>`. Conditional puts are links; one that is lost is an error of the store's own, as S3's."""

    protocol = "s3"
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("s3://").strip("/")

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        strike("bucket.before")
        aside = Path(path).parent / f".{uuid.uuid4().hex}"
        aside.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(value)
        try:
            (os.link if mode == "create" else os.replace)(aside, path)
        except FileExistsError:
            raise OSError(errno.EINVAL, "PreconditionFailed") from None
        finally:
            aside.unlink(missing_ok=True)
        strike("bucket.after")

    def cat_file(self, path: str, *args: Any, **kwargs: Any) -> bytes:
        return Path(path).read_bytes()

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        state = os.stat(path)
        kind = "directory" if os.path.isdir(path) else "file"
        return {"name": path, "type": kind, "size": state.st_size}

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        return [self.info(f"{path}/{name}") for name in os.listdir(path) if not name.startswith(".")]

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        if recursive and os.path.isdir(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)
