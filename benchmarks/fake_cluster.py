"""An autoscaling Ray cluster on one machine, whose nodes are fake: for benchmarks of what a job does as nodes come.

`ray.cluster_utils.AutoscalingCluster` ends every Ray on the machine before it starts its own. This one starts a head
with ports and folders of its own, and ends the processes that it started, by their ids.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

HEAD_ID = "f" * 51 + "00000"
STORE = 300_000_000  # bytes of a node's object store
os.environ["RAY_AUTH_MODE"] = "disabled"  # nothing here listens to another machine; read when ray is imported


class FakeAutoscalingCluster:
    """A head of `head` resources, and up to `max_workers` nodes of `worker` resources, started when they are asked for.

    Args:
        idle_seconds: a node without work is ended after so long.
    """

    def __init__(self, head: dict[str, float], worker: dict[str, float], max_workers: int, idle_seconds: float = 20):
        self.folder = Path(tempfile.mkdtemp(prefix="ray-fake-", dir="/tmp"))
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        provider = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
        places = {"gcs_address": self.address, "launch_multiple": True, "head_node_id": HEAD_ID}
        config: dict[str, Any] = {
            "cluster_name": "fake",
            "provider": {"type": "external", "module": provider, **places},
            "max_workers": max_workers,
            "idle_timeout_minutes": idle_seconds / 60,
            "upscaling_speed": 1.0,
            "head_node_type": "ray.head.default",
            "available_node_types": {
                "ray.head.default": {"resources": dict(head), "node_config": {}, "max_workers": 0},
                "worker": {
                    "resources": worker | {"object_store_memory": STORE},
                    "node_config": {},
                    "min_workers": 0,
                    "max_workers": max_workers,
                },
            },
            **{name: {} for name in ("auth", "docker", "file_mounts")},
            "cluster_synced_files": [],
            **{f"{name}_commands": [] for name in ("initialization", "setup", "head_setup", "worker_setup")},
            **{f"{name}_start_ray_commands": [] for name in ("head", "worker")},
        }
        (self.folder / "cluster.json").write_text(json.dumps(config))
        command = [
            *(sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--head", "--block"),
            *(
                "--node-ip-address=127.0.0.1",
                f"--port={port}",
                f"--temp-dir={self.folder}/ray",
                "--include-dashboard=false",
            ),
            *(f"--autoscaling-config={self.folder}/cluster.json", f"--num-cpus={head.get('CPU', 0):g}", "--num-gpus=0"),
            *(f"--object-store-memory={STORE}", "--min-worker-port=0", "--max-worker-port=0"),
        ]
        env = os.environ | {
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        }
        self.log = open(self.folder / "head.log", "w")  # noqa: SIM115  # it stays open as long as the head lives
        self.head = subprocess.Popen(command, env=env, stdout=self.log, stderr=subprocess.STDOUT)

    def connect(self) -> Any:
        """Connect this process to the cluster, once its head is up."""
        import ray

        host, port = self.address.split(":")
        deadline = time.monotonic() + 300
        while True:
            if self.head.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the head did not start: {self.told()}")
            try:
                socket.create_connection((host, int(port)), timeout=5).close()
                return ray.init(address=self.address, log_to_driver=False)
            except OSError:
                time.sleep(0.5)

    def told(self) -> str:
        return (self.folder / "head.log").read_text(errors="replace")[-2000:]

    def stop(self) -> None:
        """End every process that was started here: those below the head, and those that name its folder."""
        mine = {self.head.pid: psutil.Process(self.head.pid)} if self.head.poll() is None else {}
        for process in [child for root in list(mine.values()) for child in root.children(recursive=True)]:
            mine[process.pid] = process
        for process in psutil.process_iter(["cmdline"]):
            if str(self.folder) in " ".join(process.info["cmdline"] or []) and process.pid != os.getpid():
                mine[process.pid] = process
        for process in mine.values():
            try:
                process.kill()
            except psutil.Error:
                continue
        psutil.wait_procs(list(mine.values()), timeout=30)
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)
