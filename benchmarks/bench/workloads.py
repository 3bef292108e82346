"""Deterministic synthetic workloads W1-W5: random prompts as token ids and exact output lengths (EOS ignored).

    w = build("W5", vocab=128256)       # w.prompts: lists of ids, w.out_lens: tokens to generate for each

The same (name, vocab, seed, n) gives the same rows on any machine (numpy PCG64 with fixed draws); results carry a hash
of them, and engines are compared only where it is equal. In `parse`, `W2:256` means W2 with 256 rows, `W4x8` W4 with 8
different prefixes in random order, and `W1@1` W1 at temperature 1 instead of greedy.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace

import numpy as np

LOW, HIGH = 256, 512  # first ids, and ids before the end of the vocabulary, that are left out (special tokens)


@dataclass(frozen=True)
class Spec:
    """Rows, input and output length (kind and its numbers), tokens of the prefix that all rows share."""

    num_rows: int
    inputs: tuple
    outputs: tuple
    shared_prefix: int = 0


SPECS = {
    "W1": Spec(1000, ("uniform", 512, 0.5), ("uniform", 128, 0.5)),
    "W2": Spec(1000, ("fixed", 1024), ("fixed", 1024)),
    "W3": Spec(2000, ("fixed", 2048), ("fixed", 16)),
    "W4": Spec(2000, ("fixed", 128), ("fixed", 64), 1536),
    "W5": Spec(2000, ("lognormal", 220, 1.0), ("lognormal", 190, 0.9)),
}


@dataclass
class Workload:
    name: str
    prompts: list[list[int]]
    out_lens: list[int]
    temperature: float = 0.0

    @property
    def num_input_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_output_tokens(self) -> int:
        return sum(self.out_lens)

    @property
    def num_shared_tokens(self) -> int:
        """Length of the prefix that all prompts share; 0 for a single row."""
        low, high = min(self.prompts), max(self.prompts)
        same = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
        return same if len(self.prompts) > 1 else 0

    def digest(self) -> str:
        """SHA-256 over lengths and ids, as little-endian int32; first 16 digits."""
        sha = hashlib.sha256()
        for prompt, num in zip(self.prompts, self.out_lens, strict=True):
            sha.update(np.asarray([len(prompt), num], "<i4").tobytes())
            sha.update(np.asarray(prompt, "<i4").tobytes())
        return sha.hexdigest()[:16]


def _draw(rng: np.random.Generator, spec: tuple, n: int) -> np.ndarray:
    kind, mean, *rest = spec
    if kind == "fixed":
        return np.full(n, mean, dtype=np.int64)
    if kind == "uniform":
        return rng.integers(round(mean * (1 - rest[0])), round(mean * (1 + rest[0])) + 1, size=n)
    mu = np.log(mean) - rest[0] ** 2 / 2  # `mean` is that of the distribution before clipping to 4..1024
    return np.clip(np.rint(rng.lognormal(mu, rest[0], size=n)), 4, 1024).astype(np.int64)


def build(name: str, vocab: int, seed: int = 0, n: int | None = None, num_prefixes: int = 1) -> Workload:
    spec = SPECS[name]
    n = n or spec.num_rows
    rng = np.random.Generator(np.random.PCG64([seed, int(name[1:])]))
    shared = rng.integers(LOW, vocab - HIGH, size=spec.shared_prefix).tolist()
    in_lens, out_lens = _draw(rng, spec.inputs, n), _draw(rng, spec.outputs, n)
    ids = rng.integers(LOW, vocab - HIGH, size=int(in_lens.sum()))
    others = rng.integers(LOW, vocab - HIGH, size=(num_prefixes - 1, spec.shared_prefix)).tolist()
    prefixes, which = [shared, *others], rng.integers(num_prefixes, size=n)
    parts = np.split(ids, np.cumsum(in_lens)[:-1])
    prompts = [prefixes[i] + part.tolist() for i, part in zip(which.tolist(), parts, strict=True)]
    return Workload(name, prompts, out_lens.tolist())


def parse(text: str, vocab: int) -> list[Workload]:
    """Workloads of a comma-separated list such as `W1@1,W2:256,W4x8`."""
    works = []
    if vocab <= LOW + HIGH:
        raise ValueError(f"workloads want a vocabulary of more than {LOW + HIGH} tokens, this model's has {vocab}")
    for item in text.split(","):
        match = re.fullmatch(r"(W\d)(?:x(\d+))?(?::(\d+))?(?:@([\d.]+))?", item)
        if match is None or match[1] not in SPECS:
            raise ValueError(f"workload {item!r}: want one of {', '.join(SPECS)}, maybe with x8, :256 or @1 behind it")
        work = build(match[1], vocab, n=int(match[3]) if match[3] else None, num_prefixes=int(match[2] or 1))
        works.append(replace(work, name=item, temperature=float(match[4] or 0)))
    return works


def warmup(vocab: int, n: int = 32, length: int = 64, out: int = 16) -> Workload:
    """Short prompts that share nothing with a workload."""
    rng = np.random.Generator(np.random.PCG64([12345, 999]))
    low, high = (LOW, vocab - HIGH) if vocab > LOW + HIGH else (0, vocab)
    return Workload("warmup", [rng.integers(low, high, size=length).tolist() for _ in range(n)], [out] * n)
