"""From a process' start to its first token: where the time goes.

    python benchmarks/cold_start.py --model FOLDER [--checkpoint FOLDER] [--times 3] [--imports PATH]

With a FOLDER that has only a config.json, random weights are saved as a checkpoint first, which then is in the page
cache (--checkpoint says where; a folder that has weights is used as it is). Each start is a process of its own that
says when it reached a point; the first compiles Triton's kernels unless Triton's cache has them. `--imports` writes
what each import of one more start takes (python -X importtime).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHILD = """
import sys, time
stamps = [("interpreter", time.monotonic())]
{first}
def stamp(name): stamps.append((name, time.monotonic()))
{imports}
llm = LLM({model!r}, skip_tokenizer_init={bare}, max_model_len=4096)
stamp("LLM()")
llm.generate([{{"prompt_token_ids": [300] * 16}}], SamplingParams(max_tokens=1), use_tqdm=False)
stamp("first token")
import json
print(json.dumps(stamps))
"""
IMPORTS = """
import torch
stamp("import torch")
import transformers
stamp("import transformers")
from rayinfer.llm import LLM, SamplingParams
stamp("import rayinfer")
import rayinfer.engine, rayinfer.models.load, rayinfer.runner.memory
POINTS = [
    (rayinfer.models.load, "_inspect"), (rayinfer.models.load, "_pretrained"), (rayinfer.models.load, "fuse"),
    (rayinfer.engine, "load_model"), (rayinfer.runner.memory, "warm_up"), (rayinfer.engine, "num_kv_blocks"),
    (rayinfer.engine.Runner, "allocate"), (rayinfer.engine.Runner, "capture_graphs"),
]
def follow(place, name):
    call = getattr(place, name)
    def called(*args, **kwargs):
        result = call(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        stamp(name)
        return result
    setattr(place, name, called)
for point in POINTS:
    follow(*point)
"""


def make_checkpoint(model: str, folder: Path) -> None:
    """Random weights of the config's shape, written by transformers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=torch.bfloat16)
    module.save_pretrained(folder, max_shard_size="5GB")


def start(model: str, options: tuple[str, ...] = (), first: str = "") -> tuple[list[tuple[str, float]], str]:
    """Seconds from the process' start to each point, and what it wrote to stderr."""
    bare = not any(Path(model).glob("tokenizer*"))
    script = CHILD.format(imports=IMPORTS, first=first, model=model, bare=bare)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, *options, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    if done.returncode:
        sys.exit(done.stderr)
    return [(name, at - begin) for name, at in json.loads(done.stdout.splitlines()[-1])], done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--imports", type=Path)
    parser.add_argument("--first", default="", help="a line of Python to begin with")
    args = parser.parse_args()
    folder = Path(args.model)
    if not any(folder.glob("*.safetensors")):
        folder = args.checkpoint or Path(tempfile.mkdtemp(prefix="checkpoint-"))
        make_checkpoint(args.model, folder)
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            while file.read(2**26):
                pass
    python = sys.version.split()[0]
    print(f"{folder.name}: {num_bytes / 2**30:.1f} GiB of weights, {os.cpu_count()} cores, Python {python}")
    columns = [start(str(folder), first=args.first)[0] for _ in range(args.times)]
    print("\n| seconds from the process' start | " + " | ".join(f"start {i + 1}" for i in range(args.times)) + " |")
    print("|---|" + "---|" * args.times)
    for rows in zip(*columns, strict=True):
        print(f"| {rows[0][0]} | " + " | ".join(f"{at:.2f}" for _, at in rows) + " |")
    if args.imports:
        args.imports.write_text(start(str(folder), ("-X", "importtime"))[1])
    if not args.checkpoint and folder != Path(args.model):
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
