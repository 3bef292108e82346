"""Where a model comes from, and whether its files are all there: checked before anything is loaded."""

import functools
import importlib.util
import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rayinfer.errors import ConfigError

_SAFE = "model.safetensors"
_PICKLED = "pytorch_model.bin"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Source:
    """A local folder, a hub id, or one .gguf file (then `path` is its folder)."""

    path: str
    gguf_file: str | None = None
    revision: str | None = None

    @property
    def local(self) -> bool:
        return os.path.isdir(self.path)

    def hub_kwargs(self) -> dict[str, Any]:
        """Keyword arguments that transformers' from_pretrained wants beside the path."""
        kwargs = {"gguf_file": self.gguf_file, "revision": None if self.local else self.revision}
        return {key: value for key, value in kwargs.items() if value is not None}


def find_source(model: str, revision: str | None = None) -> Source:
    """Say what kind of source `model` names.

    Raises:
        ConfigError: the folder or file is missing, or a GGUF file cannot be read here.
    """
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ConfigError(f"model = {model!r}: no such file (a .gguf is a local file; download it first)")
        if importlib.util.find_spec("gguf") is None:
            raise ConfigError(f"model = {model!r}: a .gguf needs the package gguf: pip install 'rayinfer[gguf]'")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ConfigError(f"model = {model!r}: not a GGUF file (it does not begin with the bytes GGUF)")
        _speed_up_gguf()
        return Source(str(path.parent), path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"model = {model!r}: no config.json in it; want what save_pretrained writes, or a .gguf")
        return Source(str(path))
    if path.exists():
        raise ConfigError(f"model = {model!r}: a file, but not a .gguf; want a folder, a hub id or a .gguf file")
    if path.is_absolute() or model.startswith(("./", "../", "~")) or model.count("/") != 1:
        raise ConfigError(f"model = {model!r}: no such folder, and not a hub id (organisation/name)")
    return Source(model, revision=revision)


@functools.cache
def _speed_up_gguf() -> None:
    """Take the two slowest things out of transformers' GGUF loading; what is loaded stays the same.

    The reader slices a memmap for each string of the vocabulary, at three times the price of an array, and the same
    table of tensor names is made anew for each module of the tree, which takes longer than reading the file.
    """
    import gguf
    import numpy as np

    class Reader(gguf.GGUFReader):
        def _get(self, *args: Any, **kwargs: Any) -> Any:
            if isinstance(self.data, np.memmap):
                self.data = np.asarray(self.data)  # type: ignore[assignment]
            return super()._get(*args, **kwargs)

    gguf.GGUFReader = Reader  # type: ignore[misc]
    gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a local model that transformers would read; none if there are none."""
    index = folder / f"{_SAFE}.index.json"
    if (folder / _SAFE).is_file() or not index.is_file():
        return [folder / _SAFE][: (folder / _SAFE).is_file()]
    return sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})


def check_weights(source: Source, pickled: bool = False) -> None:
    """Check that every weight file is there and whole, without reading weights.

    Args:
        pickled: take pytorch_model.bin, and only that.

    Raises:
        ConfigError: a missing or truncated file, named; or only pickled weights, without being asked for them.
    """
    if source.gguf_file is not None:
        return  # transformers parses its tensor table when it reads the config
    name = _PICKLED if pickled else _SAFE
    folder, index = Path(source.path), f"{name}.index.json"
    if not source.local:
        _check_hub(source, name)
    elif (folder / name).is_file():
        _check_shard(folder / name, [], "")
    elif (folder / index).is_file():
        _check_shards(folder, index)
    elif not pickled and (pickles := sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)):
        raise ConfigError(
            f"model = {source.path!r}: has only pickled weights ({pickles[0]}), which can run any code when loaded; "
            "convert them to safetensors: load them where you trust them, then save_pretrained(); or set "
            f"load_format='pt' for a {_PICKLED}, of which nothing but tensors is then unpickled"
        )
    else:
        raise ConfigError(f"model = {source.path!r}: has no weights; want {name} or {index} and its shards")


def _check_shards(folder: Path, index: str) -> None:
    try:
        weight_map: dict[str, str] = json.loads((folder / index).read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        raise ConfigError(f"model file {folder / index} cannot be read: {error!r}; download it again") from None
    names = sorted(set(weight_map.values()))
    if missing := [name for name in names if not (folder / name).is_file()]:
        reason = f"{len(missing)} of {len(names)} weight files that {index} names are missing"
        shown = f"{', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}"
        raise ConfigError(f"model = {str(folder)!r}: {reason}: {shown}")
    for name in names:
        _check_shard(folder / name, [tensor for tensor, shard in weight_map.items() if shard == name], index)


def _check_shard(path: Path, tensors: list[str], index: str) -> None:
    """Check that a file is whole, and that it holds the tensors that the index says it holds."""
    if path.suffix == ".bin":
        if not zipfile.is_zipfile(path):  # its directory stands at its end
            raise ConfigError(f"model file {path}: cut short, or of torch before 1.6; load and save it again")
        return
    try:
        with safe_open(path, "pt") as file:  # compares the header with the size of the file
            held = set(file.keys())
    except SafetensorError as error:
        size = f"not a safetensors file or cut short ({path.stat().st_size} bytes)"
        raise ConfigError(f"model file {path}: {size}: {error}; download it again") from None
    if absent := [tensor for tensor in tensors if tensor not in held]:
        raise ConfigError(f"model file {path}: lacks tensor {absent[0]!r}, which {index} says it holds")


def _check_hub(source: Source, name: str) -> None:
    """The weights are in the cache, or the hub has them."""
    from huggingface_hub import file_exists, try_to_load_from_cache

    names = (f"{name}.index.json", name)
    if any(isinstance(try_to_load_from_cache(source.path, name, revision=source.revision), str) for name in names):
        return
    try:
        found = any(file_exists(source.path, name, revision=source.revision) for name in names)
    except Exception as error:  # whatever a network gives
        reason = f"its weights are not in the cache and the hub cannot be asked: {error}"
        raise ConfigError(f"model = {source.path!r}: {reason}") from None
    if not found:
        raise ConfigError(f"model = {source.path!r}: the hub has no {name} for it; pickles want load_format='pt'")
