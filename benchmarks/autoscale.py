"""Figure 7: an autoscaling cluster: time until n of n engines are busy, and what shrinking costs.

    python benchmarks/autoscale.py --engines 4

A fake cluster (fake_cluster.py) starts with a head alone; a node for one engine comes for every engine that is asked
for. The pool is (1, n). Rows first come as fast as they are taken, until all engines are busy and have been for a
while; then one at a time and slowly, so that the pool shrinks; what the engines computed is compared with what came
out. The model is tiny: this is about Ray, not about speed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import describe_machine, table, write_result
from fake_cluster import FakeAutoscalingCluster
from tiny_llama import save_tiny_llama

MAX_TOKENS = 200


class Ask:
    """`preprocess`: rows from `num_fast` on come one in `seconds`."""

    def __init__(self, num_fast: int, seconds: float):
        self.num_fast, self.seconds = num_fast, seconds

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if row["id"] >= self.num_fast:
            time.sleep(self.seconds)
        return {"prompt": f"row {row['id']}"}


class Watch(threading.Thread):
    """Looks at the engines twice a second: (seconds, nodes, engines, busy engines)."""

    def __init__(self, board: Any):
        super().__init__(daemon=True)
        self.board, self.begin, self.seen, self.ended = board, time.monotonic(), [], threading.Event()

    def run(self) -> None:
        import ray

        while not self.ended.wait(0.5):
            stats = ray.get(self.board.snapshot.remote())
            nodes = sum(node["Alive"] for node in ray.nodes()) - 1
            now = (nodes, stats["num_engines"], stats["num_busy"])
            if not self.seen or self.seen[-1][1:] != now:
                self.seen.append((time.monotonic() - self.begin, *now))
                print(f"{self.seen[-1][0]:6.1f} s: {now[0]} nodes, {now[1]} engines, {now[2]} busy", flush=True)

    def first(self, column: int, least: int) -> float:
        return next((row[0] for row in self.seen if row[column] >= least), float("nan"))


def run(options: argparse.Namespace, model: str) -> tuple[Watch, dict[str, Any]]:
    import ray

    from rayinfer.processors import EngineProcessorConfig, StatsBoard, build_processor

    board = StatsBoard.remote()
    ray.get(board.snapshot.remote())
    config = EngineProcessorConfig(
        model_source=model,
        engine_kwargs=dict(device="cpu", max_model_len=256, max_num_seqs=8, cpu_kv_cache_gib=0.01, num_threads=1),
        sampling_params=dict(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True),
        concurrency=(1, options.engines),
        num_gpus=1,
        tokenizer_concurrency=1,
    )
    ask = Ask(options.rows, options.pause)
    processor = build_processor(config, preprocess=ask, preprocess_map_kwargs={"num_cpus": 0}, stats_actor=board)
    num_rows = options.rows + options.slow_rows
    dataset = replace(processor, any_rows=True)(ray.data.range(num_rows, override_num_blocks=num_rows // 32))
    watch = Watch(board)
    watch.start()
    ids: Counter[int] = Counter()
    attempts: Counter[int] = Counter()
    tokens = 0
    for batch in dataset.iter_batches(batch_size=None):
        ids.update(batch["id"].tolist())
        attempts.update(batch["attempts"].tolist())
        tokens += int(batch["num_generated_tokens"].sum())
    seconds = time.monotonic() - watch.begin
    time.sleep(3)
    computed = int(ray.get(board.snapshot.remote())["num_generated_tokens"])
    watch.ended.set()
    watch.join()
    end = {
        "seconds": seconds,
        "lost": num_rows - len(ids),
        "doubled": sum(ids.values()) - len(ids),
        "attempts": dict(attempts),
        "computed again": computed - tokens,
    }
    return watch, end


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--rows", type=int, default=2560, help="that come at once")
    parser.add_argument("--slow-rows", type=int, default=96, help="that come one by one")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between two of these")
    options = parser.parse_args()
    import ray

    with tempfile.TemporaryDirectory() as model:
        save_tiny_llama(Path(model))
        cluster = FakeAutoscalingCluster({"CPU": 3}, {"CPU": 1, "GPU": 1}, options.engines)
        try:
            cluster.connect()
            ray.data.DataContext.get_current().enable_progress_bars = False
            watch, end = run(options, model)
        finally:
            ray.shutdown()
            cluster.stop()
    most = max(row[3] for row in watch.seen)
    peak = next(i for i, row in enumerate(watch.seen) if row[3] == most)
    rows = [
        ["first node", f"{watch.first(1, 1):.0f} s", ""],
        ["first engine busy", f"{watch.first(3, 1):.0f} s", ""],
        [f"{options.engines} nodes", f"{watch.first(1, options.engines):.0f} s", ""],
        [f"{options.engines} of {options.engines} engines busy", f"{watch.first(3, options.engines):.0f} s", ""],
        ["engines left before the end", f"{min(row[2] for row in watch.seen[peak:])}", "fewer"],
        ["rows lost, doubled by Ray", f"{end['lost']}, {end['doubled']}", "0, 0"],
        ["tokens computed and not in the table", f"{end['computed again']}", "0"],
        ["rows by attempts", str(end["attempts"]), "all 1"],
        ["job", f"{end['seconds']:.0f} s", ""],
    ]
    command = f"`python benchmarks/autoscale.py {' '.join(sys.argv[1:])}`".replace(" `", "`")
    header = [f"{options.rows} rows at once, {options.slow_rows} slowly; pool (1, {options.engines})", "seen", "target"]
    text = "\n\n".join(["# A fake autoscaling cluster", command, describe_machine(), table(header, rows)])
    print(write_result("autoscale.md", text).read_text(encoding="utf-8"))
    return int(most < options.engines or bool(end["lost"] or end["doubled"] or end["computed again"]))


if __name__ == "__main__":
    sys.exit(main())
