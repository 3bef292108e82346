"""A layer's matrix products by tokens: how many rows a CUDA graph should have, and how many tokens a step with prompts.

    python benchmarks/products.py --model FOLDER [--parts rows,tokens] [--out PATH]
    python benchmarks/products.py --sizes PATH [PATH ...]

FOLDER needs only a config.json (random weights). `rows`: each product of 8 to 1,024 rows, replayed from a CUDA graph
over several layers' weights, as decode steps are; microseconds, also as JSON in PATH. `tokens`: a whole layer in order,
at the card's power limit, by tokens and by the pieces that the MLP is computed in, each five times by turns.
`--sizes` reads such files, prints the sizes of graphs that lose least on average to the best size that is no smaller,
and what the engine's own sizes and even ones lose. Without a GPU it runs tiny: a test of the script.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rayinfer.runner.graphs import SIZES

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
MOST = 1024 if GPU else 32
EVEN = (1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 512, 32), *range(512, 1025, 64))
STEPS = [(16384, 4), (16380, 4), (16376, 4), (16376, 3), (16376, 2), (16376, 1), (16384, 1), (8192, 1), (8188, 1)]
STEPS += [(4096, 1), (4094, 1), (4095, 1)]
Products = dict[str, tuple[int, int]]


def products_of(folder: str) -> Products:
    """Output and input channels of a layer's four products."""
    config = json.loads((Path(folder) / "config.json").read_text())
    hidden, heads, inner = config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
    size, kv_heads = config.get("head_dim") or hidden // heads, config.get("num_key_value_heads", heads)
    qkv, wide = (heads + 2 * kv_heads) * size, 2 * inner
    return {"qkv": (qkv, hidden), "out": (hidden, heads * size), "gate_up": (wide, hidden), "down": (hidden, inner)}


def weights_of(products: Products, copies: int) -> dict[str, list[torch.Tensor]]:
    def draw(shape: tuple[int, int]) -> torch.Tensor:
        return torch.empty(shape, device=DEVICE, dtype=DTYPE).normal_(0, 0.02)

    return {name: [draw(shape) for _ in range(copies)] for name, shape in products.items()}


def multiply(name: str, x: torch.Tensor, weight: torch.Tensor, onto: torch.Tensor) -> None:
    """As the engine does: the last product of a block adds to the stream."""
    if name in ("out", "down"):
        onto.addmm_(x, weight.t(), beta=0.5)  # 0.5: the values are to stay small
    else:
        torch.mm(x, weight.t(), out=onto)


def wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def by_rows(products: Products) -> dict[str, dict[int, float]]:
    """Microseconds of each product by the number of rows."""
    bytes_each = max(a * b for a, b in products.values()) * 2
    weights = weights_of(products, max(4, min(24, 2**28 // bytes_each)) if GPU else 2)  # so many miss the L2 cache
    found: dict[str, dict[int, float]] = {name: {} for name in products}
    for rows in range(8, MOST + 1, 8):
        for name, (num_out, num_in) in products.items():
            x = torch.randn(rows, num_in, device=DEVICE, dtype=DTYPE)
            onto = torch.zeros(rows, num_out, device=DEVICE, dtype=DTYPE)

            def all_layers(name: str = name, x: torch.Tensor = x, onto: torch.Tensor = onto) -> None:
                for weight in weights[name]:
                    multiply(name, x, weight, onto)

            all_layers()
            wait()
            replay: Callable[[], None] = all_layers
            if GPU:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    all_layers()
                replay = graph.replay
            replay()
            times = []
            for _ in range(4):
                wait()
                start = time.perf_counter()
                for _ in range(3):
                    replay()
                wait()
                times.append((time.perf_counter() - start) / 3 / len(weights[name]))
            found[name][rows] = round(1e6 * min(times), 2)
    return found


def by_tokens(products: Products) -> None:
    """Print microseconds a token of a layer's products, the median of five."""
    steps = STEPS if GPU else [(24, 1), (24, 3)]
    most, weights = max(tokens for tokens, _ in steps), weights_of(products, 2)
    inputs = {name: torch.randn(most, shape[1], device=DEVICE, dtype=DTYPE) for name, shape in products.items()}
    outputs = {name: torch.zeros(most, shape[0], device=DEVICE, dtype=DTYPE) for name, shape in products.items()}

    def layers(tokens: int, pieces: int) -> None:
        for layer in range(2):
            for name in ("qkv", "out"):
                multiply(name, inputs[name][:tokens], weights[name][layer], outputs[name][:tokens])
            for part in torch.arange(tokens).chunk(pieces):
                for name in ("gate_up", "down"):
                    at = slice(int(part[0]), int(part[-1]) + 1)
                    multiply(name, inputs[name][at], weights[name][layer], outputs[name][at])

    times: dict[tuple[int, int], list[float]] = {step: [] for step in steps}
    for turn in range(6):  # the first, before the card is warm, does not count
        for step in steps if turn % 2 else steps[::-1]:
            layers(*step)
            wait()
            start, num = time.perf_counter(), 0
            while time.perf_counter() - start < (0.25 if GPU else 0.01):
                layers(*step)
                num += 1
                wait()
            times[step].append((time.perf_counter() - start) / num / 2 / step[0])
    print("\n| tokens | pieces of the MLP | us a token and layer | to the first |\n|---|---|---|---|")
    first = median(times[steps[0]][1:])
    for step, all_times in times.items():
        own = median(all_times[1:])
        print(f"| {step[0]:,} | {step[1]} | {1e6 * own:.4f} | {own / first:.3f} |", flush=True)


def loss(time_of: dict[int, float], sizes: Sequence[int], low: int, high: int) -> float:
    """Sum over rows in (low, high] of what a size costs beyond the best one; small numbers of rows weigh more."""
    total = 0.0
    for rows in range(low + 8, high + 1, 8):
        size = sizes[bisect_left(sizes, rows)]
        best = min(us for other, us in time_of.items() if other >= rows)
        total += (time_of[size] / best - 1) / rows**0.5
    return total


def choose(models: Sequence[dict[int, float]], low: int, high: int, num: int) -> list[int]:
    """`num` sizes in (low, high] that lose least on all models together, by dynamic programming over the last size."""
    points = [low, *(size for size in models[0] if low < size <= high)]
    cost = {(a, b): sum(loss(m, [b], a, b) for m in models) for i, a in enumerate(points) for b in points[i + 1 :]}
    best: dict[int, tuple[float, list[int]]] = {low: (0.0, [])}
    for _ in range(num):
        longer: dict[int, tuple[float, list[int]]] = {}
        for last, (value, sizes) in best.items():
            for size in points:
                if size > last and (size not in longer or value + cost[last, size] < longer[size][0]):
                    longer[size] = value + cost[last, size], [*sizes, size]
        best = longer
    return best[high][1]


def print_sizes(paths: Sequence[str]) -> None:
    models = []
    for path in paths:
        found: dict[str, dict[str, float]] = json.loads(Path(path).read_text())["us"]
        models.append({int(rows): sum(times[rows] for times in found.values()) for rows in found["qkv"]})
    most = max(models[0])
    spans = [(low, high, num) for low, high, num in ((64, 256, 10), (256, 1024, 16)) if high <= most]
    for low, high, num in spans:
        weight = sum(rows**-0.5 for rows in range(low + 8, high + 1, 8))
        for name, sizes in ((f"{num} chosen", choose(models, low, high, num)), ("the engine's", SIZES), ("even", EVEN)):
            lost = ", ".join(f"{100 * loss(model, sizes, low, high) / weight:.1f} %" for model in models)
            print(f"{low} to {high} rows, {name}: {lost}  {[s for s in sizes if low < s <= high]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--parts", default="rows,tokens")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sizes", nargs="+")
    args = parser.parse_args()
    if args.sizes:
        print_sizes(args.sizes)
        return
    if args.model is None:
        parser.error("--model: a folder with a config.json, or --sizes with files")
    products, parts = products_of(args.model), args.parts.split(",")
    print(f"{torch.cuda.get_device_name() if GPU else 'CPU'}, torch {torch.__version__}: {products}", flush=True)
    if "rows" in parts:
        found: Any = by_rows(products)
        for name, times in found.items():
            print(f"{name}: " + " ".join(f"{rows}:{us}" for rows, us in times.items()), flush=True)
        if args.out:
            args.out.write_text(json.dumps({"products": products, "us": found}) + "\n")
    if "tokens" in parts:
        by_tokens(products)


if __name__ == "__main__":
    main()
