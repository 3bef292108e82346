"""Models, prompts and the machine line that the CPU benchmarks share. Run `make fetch` first."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / ".cache" / "models"
DATA = ROOT / ".cache" / "data"
RESULTS = ROOT / "benchmarks" / "results"
GGUF = {"smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf", "gemma3": "gemma-3-270m-q4_k_m.gguf"}
# A base model follows an example better than an instruction; the example is a prefix that all rows share.
BASE_PROMPT = (
    "Text: The Pacific Ocean is the largest and deepest of Earth's five oceanic divisions. It extends from the Arctic "
    "Ocean in the north to the Southern Ocean in the south.\nSummary: The Pacific is the largest ocean on Earth.\n\n"
    "Text: {text}\n"
    "Summary:"
)


def gguf_path(name: str) -> Path:
    path = MODELS / GGUF[name]
    if not path.exists():
        sys.exit(f"{path} is missing: run `make fetch`" + (" and tools/fetch.py --gemma" if name == "gemma3" else ""))
    return path


def load_rows(num: int, table: str = "demo") -> list[dict[str, Any]]:
    """The first `num` rows of .cache/data/<table>.parquet, once more from the start when there are fewer."""
    import pyarrow.parquet as pq

    rows = pq.read_table(DATA / f"{table}.parquet").to_pylist()
    return [rows[i % len(rows)] for i in range(num)]


def messages(row: dict[str, Any]) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Summarize in one short sentence: {row['text']}"}]


def load_reference(name: str) -> tuple[Any, Any]:
    """transformers' own model, fp32, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = gguf_path(name)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval(), tokenizer


def prompt_ids(name: str, tokenizer: Any, rows: list[dict[str, Any]]) -> list[list[int]]:
    """Token ids of the rows' prompts: the chat template for the instruct model, an example for the base model."""
    if name == "smollm2":
        texts = [tokenizer.apply_chat_template(messages(r), tokenize=False, add_generation_prompt=True) for r in rows]
        return tokenizer(texts, add_special_tokens=False)["input_ids"]
    return tokenizer([BASE_PROMPT.format(text=row["text"]) for row in rows])["input_ids"]


def params_of(out_lens: Iterable[int], temperature: float = 0.0) -> list[Any]:
    """SamplingParams of rows that yield so many tokens each, whatever these are."""
    from rayinfer import SamplingParams

    common = {"temperature": temperature, "ignore_eos": True, "detokenize": False}
    return [SamplingParams(max_tokens=num, **common) for num in out_lens]


def start_clock() -> Any:
    """An actor in the place of a job's StatsBoard; `at` gives the time.time() when the first engine was loaded."""
    import ray

    @ray.remote(num_cpus=0)
    class Loaded:
        def __init__(self) -> None:
            self._at = 0.0

        def report(self, engine_id: str, stats: Any) -> None:
            self._at = self._at or time.time() - 1.0  # engines report for the first time a second after they are loaded

        def at(self) -> float:
            return self._at

    return Loaded.remote()


def describe_machine() -> str:
    import torch
    import transformers

    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return (
        f"{cpu_name()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}, "
        f"torch {torch.__version__} ({torch.get_num_threads()} threads), transformers {transformers.__version__}, "
        f"rayinfer {commit.stdout.strip() or 'unknown'}"
    )


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_result(name: str, text: str) -> Path:
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / name
    path.write_text(text.rstrip() + "\n", encoding="utf-8")
    return path
