"""Check that built archives hold every module of the four code folders and of `rayinfer bench`, under its import name.

python tools/check_dist.py dist/rayinfer-*.whl dist/rayinfer-*.tar.gz
"""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

from size_report import CODE_FOLDERS, ROOT, python_files


def expected_modules() -> set[str]:
    """Module paths as installed: rayinfer/ holds its own files, kernels/ and its like become rayinfer/kernels/."""
    paths = {str(path.relative_to(ROOT)) for name in CODE_FOLDERS for path in python_files(ROOT / name)}
    paths |= {f"bench/{path.name}" for path in python_files(ROOT / "benchmarks" / "bench")}
    return {path if path.startswith("rayinfer/") else f"rayinfer/{path}" for path in paths}


def archive_modules(archive: Path) -> set[str]:
    """Python modules in a wheel, or in a source archive below its top folder."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            names = wheel.namelist()
    else:
        with tarfile.open(archive) as source:
            names = [name.partition("/")[2] for name in source.getnames()]
    return {name for name in names if name.endswith(".py") and name.startswith("rayinfer/")}


def main() -> int:
    expected = expected_modules()
    failed = False
    for archive in map(Path, sys.argv[1:]):
        found = archive_modules(archive)
        print(f"{archive.name}: {len(found)} modules")
        for label, names in (("missing", expected - found), ("unexpected", found - expected)):
            for name in sorted(names):
                failed = True
                print(f"error: {archive.name}: {label} {name}", file=sys.stderr)
    return 1 if failed or len(sys.argv) == 1 else 0


if __name__ == "__main__":
    sys.exit(main())
