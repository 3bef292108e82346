"""Fault kinds of several nodes: a head without CPUs that the driver is on, and three nodes of two CPUs for the work."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.fault_kinds import Kind, kind
from benchmarks.fault_world import Trial, World, Wrong

KINDS: dict[str, Kind] = {}
NUM_NODES = 3
ENGINES = {"processor": {"concurrency": 2}}


class Nodes:
    """A cluster of raylets on this machine, which takes the place of the world's Ray."""

    def __init__(self, world: World):
        from ray.cluster_utils import Cluster

        world.expected()
        world.stop_ray()
        self.world = world
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        world.address = self.cluster.gcs_address
        self.nodes: list[Any] = []
        self.fill()

    def fill(self) -> None:
        """Add nodes until there are as many as in the beginning."""
        while len(self.nodes) < NUM_NODES:
            self.nodes.append(self.cluster.add_node(num_cpus=2))

    def lose(self, node: Any) -> None:
        """All processes of the node get SIGKILL."""
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def drain(self, node: Any, seconds: float) -> None:
        """What a cloud's notice of preemption does: no new work, and the node's end is told."""
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        until = int((time.time() + seconds) * 1000)
        accepted, why = GcsClient(address=self.world.address).drain_node(node.node_id, reason, "preempted", until)
        if not accepted:
            raise Wrong(f"Ray does not drain the node: {why}")

    def end(self) -> None:
        self.world.end_hosts()
        self.cluster.shutdown()
        self.world.address = ""


def lose_nodes(t: Trial, number: int) -> None:
    nodes: Nodes = t.world.nodes
    expected = t.world.expected()
    nodes.fill()
    driver = t.start(**ENGINES)
    t.wait_for(lambda: t.world.engines() or not driver.running, "an engine", driver)
    time.sleep(t.pick.uniform(0, t.world.usual / 2))
    for node in t.pick.sample(nodes.nodes, number):
        t.found["struck"] += driver.running
        nodes.lose(node)
    if number == NUM_NODES:
        time.sleep(t.pick.uniform(0, 5))
        nodes.fill()
    t.check_code(driver, (0, 1))
    if driver.code:
        t.resume(**ENGINES)
    t.reconcile(expected)


@kind("1 of 3 nodes lost", KINDS)
def one_node(t: Trial) -> None:
    """One of three nodes dies at a random time."""
    lose_nodes(t, 1)


@kind("2 of 3 nodes lost", KINDS)
def two_nodes(t: Trial) -> None:
    """Two of three nodes die at a random time."""
    lose_nodes(t, 2)


@kind("all nodes lost and back", KINDS)
def all_nodes(t: Trial) -> None:
    """All three nodes die at a random time; some seconds later there are three new ones."""
    lose_nodes(t, NUM_NODES)


@kind("drain notice", KINDS)
def drained(t: Trial) -> None:
    """A node is told that it ends in ten seconds, and then ends."""
    nodes: Nodes = t.world.nodes
    expected = t.world.expected()
    nodes.fill()
    driver = t.start(**ENGINES)
    t.wait_for(lambda: t.world.engines() or not driver.running, "an engine", driver)
    time.sleep(t.pick.uniform(0, t.world.usual / 2))
    node = t.pick.choice(nodes.nodes)
    nodes.drain(node, 10)
    t.found["struck"] += driver.running
    time.sleep(10)
    nodes.lose(node)
    t.check_code(driver, (0, 1))
    if driver.code:
        t.resume(**ENGINES)
    t.reconcile(expected)
