"""Lines by folder, against the limits of CONTRIBUTING.md. Exits 1 when a hard limit is passed.

The limit of a file is on all its lines. The limit of the four code folders together is on lines of code: blank lines,
comments and docstrings do not count (they did until they were a quarter of all lines), and both numbers are shown.
Only regular files are counted: rayinfer/kernels and its like are symlinks to folders that are counted themselves.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CODE_FOLDERS = ("kernels", "rayinfer", "processors", "pipelines")
OTHER_FOLDERS = ("tests", "benchmarks", "tools", "examples")
SOFT_FILE_LINES = 300
HARD_FILE_LINES = 500
HARD_CODE_LINES = 8000


def python_files(folder: Path) -> Iterator[Path]:
    """Python files under `folder`, not through symlinks."""
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink():
            continue
        if entry.is_dir():
            yield from python_files(entry)
        elif entry.suffix == ".py":
            yield entry


def num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def num_code_lines(path: Path) -> int:
    """Lines that are neither blank nor comment nor docstring."""
    text = path.read_text(encoding="utf-8")
    prose: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                prose.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines = enumerate(text.splitlines(), start=1)
    return sum(1 for number, line in lines if number not in prose and line.strip() and line.strip()[0] != "#")


def main() -> int:
    totals: dict[str, int] = {}
    code = 0
    problems: list[str] = []
    for name in (*CODE_FOLDERS, *OTHER_FOLDERS):
        if not (ROOT / name).is_dir():
            continue
        sizes = {path: num_lines(path) for path in python_files(ROOT / name)}
        totals[name] = sum(sizes.values())
        code += sum(num_code_lines(path) for path in sizes) * (name in CODE_FOLDERS)
        print(f"{name + '/':12} {len(sizes):4} files {totals[name]:6} lines")
        for path, lines in sizes.items():
            if lines > HARD_FILE_LINES:
                problems.append(f"{path.relative_to(ROOT)}: {lines} lines, at most {HARD_FILE_LINES} are allowed")
            elif lines > SOFT_FILE_LINES:
                print(f"    note: {path.relative_to(ROOT)} has {lines} lines (soft limit {SOFT_FILE_LINES})")
    whole = sum(totals.get(name, 0) for name in CODE_FOLDERS)
    print(f"the four code folders together: {code} of {HARD_CODE_LINES} lines of code; {whole} lines in all")
    if code > HARD_CODE_LINES:
        problems.append(f"the four code folders have {code} lines of code, at most {HARD_CODE_LINES} are allowed")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
