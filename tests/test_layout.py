"""The order of the rooms: a folder never imports one below it, and no file names the machine it was made on."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "rayinfer", "processors", "pipelines")  # each may import itself and those before it
MAX_FILE_LINES = 500

# Third-party packages that a room must not import; kernels have a list of what they may.
KERNELS_MAY = {"torch", "triton"}
MUST_NOT = {
    "rayinfer": {"ray", "pyarrow", "pandas", "fsspec", "typer", "rich"},
    "processors": {"fsspec", "typer", "rich", "pyarrow.fs", "pyarrow.parquet", "pyarrow.dataset", "pyarrow.csv"},
    "pipelines": set(),
}

# Ray's core is told to be quiet by a variable, and libgomp how long to wait, both in no other way. Nothing of ours is
# configured so.
MAY_USE_ENVIRONMENT = {"pipelines/run.py", "rayinfer/engine_process.py"}


def python_files(folder: Path) -> list[Path]:
    """Python files below `folder`, not through the symlinks that give the rooms their import names."""
    files: list[Path] = []
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            files += python_files(entry)
        elif entry.suffix == ".py":
            files.append(entry)
    return files


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "rayinfer" else ("rayinfer", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything that a file imports, inside functions and under TYPE_CHECKING too."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")
                base = ".".join(filter(None, [*parent[: len(parent) - node.level + 1], node.module]))
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def room_of(name: str) -> str | None:
    """The room that an absolute import name lives in; None for other packages."""
    parts = name.split(".")
    if parts[0] in ROOMS[2:] or parts[0] == "kernels":
        return parts[0]  # imported past the package: wrong from any room, see test_rooms_are_imported_as_rayinfer
    if parts[0] != "rayinfer":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "rayinfer"


def starts_with(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def misplaced(room: str, path: Path) -> list[str]:
    """Imports of one file that the order of the rooms forbids."""
    wrong = []
    for line, name in imports(path):
        target = room_of(name)
        if target is not None:
            bad = ROOMS.index(target) > ROOMS.index(room)
        elif room == "kernels":
            top = name.split(".")[0]
            bad = top not in KERNELS_MAY and top not in sys.stdlib_module_names
        else:
            bad = any(starts_with(name, prefix) for prefix in MUST_NOT[room])
        if bad:
            wrong.append(f"{path.relative_to(ROOT)}:{line}: {room} must not import {name}")
    return wrong


def repo_files() -> list[Path]:
    """Text files that git tracks or would track, symlinks apart."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, check=True, text=True, timeout=400,
        ).stdout  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    paths = (ROOT / name for name in listed.split("\0") if name)
    return [path for path in paths if path.is_file() and not path.is_symlink() and b"\0" not in path.read_bytes()]


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_upwards(room: str):
    files = python_files(ROOT / room)
    wrong = [problem for path in files for problem in misplaced(room, path)]
    assert files
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("room", "line", "allowed"),
    [
        ("kernels", "import triton.language as tl", True),
        ("kernels", "from transformers import AutoModel", False),
        ("kernels", "from rayinfer.config import EngineConfig", False),
        ("kernels", "from rayinfer.kernels.rope import rope", True),
        ("rayinfer", "from rayinfer import kernels", True),
        ("rayinfer", "from rayinfer import processors", False),
        ("rayinfer", "def f():\n    import ray.data", False),
        ("rayinfer", "from . import pipelines", False),
        ("rayinfer", "import importlib\nimportlib.import_module('ray')", False),
        ("processors", "import ray", True),
        ("processors", "from rayinfer.pipelines.job import Job", False),
        ("processors", "import pyarrow.parquet as pq", False),
        ("processors", "from pyarrow import fs", False),
        ("pipelines", "from rayinfer.processors.config import EngineProcessorConfig", True),
    ],
)
def test_the_import_check_itself(room: str, line: str, allowed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / room).mkdir()
    path = tmp_path / room / "sample.py"
    path.write_text(line, encoding="utf-8")
    assert (misplaced(room, path) == []) == allowed


def test_rooms_are_imported_as_rayinfer():
    """`import kernels` would work from the repo root alone: every file names its room by the installed name."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: import rayinfer.{name}, not {name}"
        for folder in (*ROOMS, "tests", "benchmarks")
        for path in python_files(ROOT / folder)
        for line, name in imports(path)
        if name.split(".")[0] in ("kernels", "processors", "pipelines")
    ]
    assert not wrong, "\n".join(wrong)


def test_rooms_are_symlinked_namespaces():
    """One code base under two paths; an __init__.py in kernels/ would be taken for Hugging Face's `kernels` package."""
    for room in ("kernels", "processors", "pipelines"):
        link = ROOT / "rayinfer" / room
        assert link.is_symlink()
        assert link.resolve() == ROOT / room
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_importing_the_engine_brings_no_ray():
    code = "import sys, rayinfer; sys.exit('ray' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr or "importing rayinfer imported ray"


def test_no_environment_variable_configures_the_code():
    wrong = []
    for path in (path for room in ROOMS for path in python_files(ROOT / room)):
        if str(path.relative_to(ROOT)) in MAY_USE_ENVIRONMENT:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)
            if name in ("environ", "environb", "getenv"):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    assert not wrong, "\n".join(wrong)


def test_files_are_small_and_ascii():
    wrong = []
    for folder in (*ROOMS, "tests", "benchmarks", "tools", "examples"):
        for path in python_files(ROOT / folder):
            text = path.read_text(encoding="utf-8")
            if len(text.splitlines()) > MAX_FILE_LINES:
                wrong.append(f"{path.relative_to(ROOT)}: {len(text.splitlines())} lines, at most {MAX_FILE_LINES}")
            if folder in ROOMS and not text.isascii():
                wrong.append(f"{path.relative_to(ROOT)}: a character that is not ASCII")
    assert not wrong, "\n".join(wrong)


def test_no_loose_ends_and_no_machine_paths():
    loose_end = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")
    machine_path = re.compile(r"(?<![\w.\-/])/(work|root|home|Users|mnt)/\w")
    index_host = re.compile(r"\b(py" + r"pi\.org|python" + r"hosted\.org|debian\.org|npm" + r"js\.(org|com))\b")
    wrong = []
    for path in repo_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            for label, pattern in (("loose end", loose_end), ("machine path", machine_path), ("host", index_host)):
                if pattern.search(line):
                    wrong.append(f"{path.relative_to(ROOT)}:{number}: {label}: {line.strip()[:100]}")
    assert not wrong, "\n".join(wrong)
