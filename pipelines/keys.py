"""Row keys: an order-free digest to compare two sets of keys in constant memory, and the search for duplicates."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

_MODULUS = 1 << 128


@dataclass
class KeyDigest:
    """Count and sum (mod 2^128) of the 128-bit BLAKE2b hashes of keys: equal for equal multisets of keys.

    Digests of parts add up to the digest of the whole, so workers compute them and the driver only adds.
    """

    count: int = 0
    total: int = 0

    def add(self, keys: Iterable[str]) -> np.ndarray:
        """Add keys and return the low 64 bits of their hashes (uint64, one a key)."""
        hashes = b"".join(hashlib.blake2b(key.encode(), digest_size=16).digest() for key in keys)
        words = np.frombuffer(hashes, dtype="<u4").reshape(-1, 4)
        for i in range(4):  # words of 32 bits: their sum in uint64 is exact below 2^32 keys a call
            self.total += int(words[:, i].sum(dtype=np.uint64)) << (32 * i)
        self.total %= _MODULUS
        self.count += len(words)
        return np.frombuffer(hashes, dtype="<u8")[::2]

    def merge(self, other: KeyDigest) -> None:
        self.count += other.count
        self.total = (self.total + other.total) % _MODULUS

    def hex(self) -> str:
        return f"{self.total:032x}"

    @classmethod
    def of(cls, count: int, hex: str) -> KeyDigest:
        return cls(count, int(hex, 16))


def find_duplicate(batches: Callable[[], Iterator[list[str]]], digest: KeyDigest) -> str | None:
    """Return a key that is there more than once, or None; adds every key to `digest`.

    Args:
        batches: gives the same keys at each call; a second pass is made only to tell a duplicate from a hash collision.

    Memory: 8 bytes a key while it runs.
    """
    parts = [digest.add(keys).copy() for keys in batches()]
    hashes = np.concatenate(parts) if parts else np.empty(0, np.uint64)
    del parts
    hashes.sort()
    repeated = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    if not repeated:
        return None
    seen = set()
    for keys in batches():
        for key, low in zip(keys, KeyDigest().add(keys).tolist(), strict=True):
            if low in repeated:
                if key in seen:
                    return key
                seen.add(key)
    return None
