"""A node is told that it will end, and ends: what a job loses, and what it computes again.

    python benchmarks/drain.py --notice 40

Two nodes with an engine each, the job's driver on a third. Once rows come, one node gets a notice of preemption, and
after `--notice` seconds all its processes are killed; a new node comes at once. With --silent it is killed without a
notice, for comparison.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from common import describe_machine, table, write_result
from tiny_llama import save_tiny_llama

MAX_TOKENS = 200


def end_node(cluster: Any, node: Any, notice: float, out: Path, seen: dict[str, float]) -> None:
    """Wait for the first commits, tell the node's end, and kill it."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    while len(list(out.glob("part-*"))) < 3:
        time.sleep(0.2)
    if notice:
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        until = int((time.time() + notice) * 1000)
        assert GcsClient(address=cluster.gcs_address).drain_node(node.node_id, reason, "preempted", until)[0]
    seen["notice"] = time.monotonic()
    time.sleep(notice)
    cluster.remove_node(node, allow_graceful=False)


def run(folder: Path, num_rows: int, notice: float, silent: bool) -> list[list[Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray
    from ray.cluster_utils import Cluster
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    from rich.console import Console

    from rayinfer.pipelines.job import JobSpec
    from rayinfer.pipelines.run import run_job
    from rayinfer.pipelines.verify import verify
    from rayinfer.processors import stats

    texts = [f"row {i}" for i in range(num_rows)]
    pq.write_table(pa.table({"text": texts}), folder / "in.parquet", row_group_size=128)
    save_tiny_llama(folder / "model")
    engine = dict(max_model_len=256, max_num_seqs=8, cpu_kv_cache_gib=0.01, num_threads=1, device="cpu")
    spec = JobSpec.parse(
        {
            "source": {"uri": str(folder / "in.parquet")},
            "prompt": "{{ text }}",
            "model": {"model_source": str(folder / "model"), **engine},
            "sampling": {"temperature": 0, "max_tokens": MAX_TOKENS, "ignore_eos": True},
            "processor": {"concurrency": 2},
            "sink": {"uri": str(folder / "out"), "rows_per_part": 16},
        }
    )
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
    seen: dict[str, float] = {}
    boards: list[Any] = []
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        begin = time.monotonic()
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        make = stats.StatsBoard.options(scheduling_strategy=here).remote  # not on the node that ends
        stats.StatsBoard.remote = lambda: boards.append(make()) or boards[-1]
        killer = threading.Thread(
            target=end_node, args=(cluster, nodes[0], 0.0 if silent else notice, folder / "out", seen)
        )
        killer.start()
        results: list[Any] = []
        job = threading.Thread(target=lambda: results.append(run_job(spec, console=Console(file=io.StringIO()))))
        job.start()
        killer.join()
        cluster.add_node(num_cpus=2)  # Cluster takes this from the main thread alone
        job.join()
        seconds = time.monotonic() - begin
        time.sleep(3)
        computed = ray.get(boards[0].snapshot.remote())["num_generated_tokens"]
    finally:
        ray.shutdown()
        cluster.shutdown()
    out = pq.read_table(folder / "out", columns=["row_key", "num_generated_tokens", "attempts"])
    result, wrong = results[0], verify(str(folder / "out"))[1]
    again = (computed - sum(out["num_generated_tokens"].to_pylist())) / MAX_TOKENS
    different = len(set(out["row_key"].to_pylist()))
    return [
        ["job", f"{result.status} in {seconds:.0f} s, {seen['notice'] - begin:.0f} s of it before the notice"],
        [
            "rows in, in the table, different ones",
            f"{num_rows}, {out.num_rows}, {different}",
        ],
        ["`rayinfer verify`", "; ".join(wrong) or "as it should be"],
        ["rows in a second attempt", sum(attempt > 1 for attempt in out["attempts"].to_pylist())],
        ["rows computed and not in the table, at most", f"{again:.1f}"],
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--notice", type=float, default=40)
    parser.add_argument("--silent", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = run(Path(folder), options.rows, options.notice, options.silent)
    command = f"`python benchmarks/drain.py {' '.join(sys.argv[1:])}`".replace(" `", "`")
    text = "\n\n".join(["# A node that is told to end", command, describe_machine(), table(["", "seen"], rows)])
    print(write_result("drain_silent.md" if options.silent else "drain.md", text).read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
