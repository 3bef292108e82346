"""How fast a dense decoder can generate on one device: three bounds, from its operations and bytes alone.

A: whatever can overlap does, so the larger of all operations and all bytes counts. B: kernels run one after another,
each at the device's ceiling. C: the same at the share of the ceiling that good kernels reach, and with the traffic of
the small operations between them; what an engine without a fault gets. The batch is always full: no start and no tail.
"""

from __future__ import annotations

from dataclasses import dataclass

EFFICIENCY = {
    "gemm": 0.88,
    "attention": 0.65,
    "bytes": 0.85,
}  # of cuBLAS, of prefill attention, of all that reads memory


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches: FLOP/s of a large product, bytes/s of memory, and where the figures come from."""

    flops: float
    bandwidth: float
    source: str


@dataclass(frozen=True)
class Shape:
    """A decoder. `num_body`: weights of its layers' products; `item_bytes`: of a weight and of a KV element."""

    num_body: int
    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    item_bytes: int = 2

    @property
    def num_head(self) -> int:
        """Weights of the output layer."""
        return self.hidden * self.vocab

    @property
    def kv_bytes(self) -> int:
        """Of one token in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.item_bytes

    @property
    def small_bytes(self) -> int:
        """Traffic of one token's norms, adds, rotation, KV write and gate, fused as far as they can be."""
        heads = 2 * (self.num_heads + 2 * self.num_kv_heads) + 2 * self.num_heads
        values = 8 * self.hidden + heads * self.head_dim + 3 * self.intermediate
        return self.num_layers * self.item_bytes * values


def bounds(
    shape: Shape,
    ceilings: Ceilings,
    *,
    num_in: float,
    num_out: float,
    num_shared: float = 0,
    kv_tokens: float,
    max_rows: float = float("inf"),
) -> dict[str, float]:
    """Output tokens a second of the bounds A, B and C.

    Args:
        num_in, num_out: tokens of a row on average. num_shared: of num_in, the prefix that all rows share; it is
            computed once and, in every step, read once for all rows.
        kv_tokens: what the KV cache holds. max_rows: rows at once.
    """
    own = num_in - num_shared
    rows = min(max_rows, (kv_tokens - num_shared) / (own + num_out / 2))
    peak, bandwidth = ceilings.flops, ceilings.bandwidth
    attention = 4 * shape.num_layers * shape.num_heads * shape.head_dim  # FLOPs of a query and a key
    gemm = (2 * shape.num_body * (own + num_out) + 2 * shape.num_head * num_out) / peak
    prefill = attention * _sum(num_shared + 1, num_in) / peak
    decode = attention * _sum(num_in + 1, num_in + num_out) / peak
    prefix = attention * num_shared * num_out / peak
    tokens_read = _sum(own + 1, own + num_out) + num_shared * num_out / rows
    kv = shape.kv_bytes * (tokens_read + own + num_out) / bandwidth
    weights = (shape.num_body + shape.num_head) * shape.item_bytes * num_out / rows / bandwidth
    small = shape.small_bytes * (own + num_out) / bandwidth
    of = EFFICIENCY
    seconds = {
        "A": max(gemm + prefill + decode, kv + weights),
        "B": max(gemm, weights) + prefill + max(kv, prefix),
        "C": max(gemm / of["gemm"], weights / of["bytes"])
        + (prefill + prefix) / of["attention"]
        + (kv + small) / of["bytes"],
    }
    return {name: num_out / value for name, value in seconds.items()}


def _sum(first: float, last: float) -> float:
    """first + (first + 1) + ... + last."""
    return (first + last) * (last - first + 1) / 2
