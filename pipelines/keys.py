"""Row keys and row numbers in bounded memory: order-free digest, search for duplicates, set of rows."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

_MODULUS = 1 << 128
_NUM_PARTITIONS = 64
_MAX_REPEATED = 1000  # so many collisions of 64 bits do not happen: one of them is a duplicate


@dataclass
class KeyDigest:
    """Count and sum (mod 2^128) of the 128-bit BLAKE2b hashes of keys: equal for equal multisets of keys.

    A row whose line could not be read has no id: its key is None, which counts as an empty one, as CSV writes it.
    Digests of parts add up to the digest of the whole, so workers compute them and the driver only adds.
    """

    count: int = 0
    total: int = 0

    def add(self, keys: Iterable[str | None]) -> np.ndarray:
        """Add keys and return the low 64 bits of their hashes (uint64, one a key)."""
        hashes = b"".join(hashlib.blake2b((key or "").encode(), digest_size=16).digest() for key in keys)
        words = np.frombuffer(hashes, dtype="<u4").reshape(-1, 4)  # their sum in uint64 is exact below 2^32 keys a call
        sums = words.sum(axis=0, dtype=np.uint64).tolist()
        self.merge(KeyDigest(len(words), sum(word << (32 * i) for i, word in enumerate(sums))))
        return np.frombuffer(hashes, dtype="<u8")[::2]

    def merge(self, other: KeyDigest) -> None:
        self.count += other.count
        self.total = (self.total + other.total) % _MODULUS

    def hex(self) -> str:
        return f"{self.total:032x}"


def find_duplicate(batches: Callable[[], Iterator[list[str | None]]], digest: KeyDigest) -> str | None:
    """Return a key that is there more than once, or None; adds every key to `digest`. Any number of keys may be None.

    Args:
        batches: gives the same keys at each call; a second pass is made only to tell a duplicate from a hash collision.

    Hashes (8 bytes a key) go to temporary files, by their highest bits, and are sorted file by file: for 10^8 keys
    800 MB of disk and 13 MB of memory.
    """
    repeated: list[int] = []
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(_NUM_PARTITIONS)]
        for keys in batches():
            digest.add(key for key in keys if key is None)
            hashes = np.sort(digest.add(key for key in keys if key is not None))
            firsts = np.arange(_NUM_PARTITIONS, dtype=np.uint64) * np.uint64(2**64 // _NUM_PARTITIONS)
            for file, some in zip(files, np.split(hashes, np.searchsorted(hashes, firsts)[1:]), strict=True):
                file.write(some.tobytes())
        for file in files:
            file.seek(0)
            hashes = np.sort(np.frombuffer(file.read(), dtype=np.uint64))
            repeated += hashes[1:][hashes[1:] == hashes[:-1]][:_MAX_REPEATED].tolist()
    doubtful = set(repeated[:_MAX_REPEATED])
    seen = set()
    for keys in batches() if doubtful else ():
        for key, low in zip(keys, KeyDigest().add(keys).tolist(), strict=True):
            if low in doubtful and key is not None:
                if key in seen:
                    return key
                seen.add(key)
    return None


class RowSet:
    """A set of the row numbers 0 .. num_rows - 1, in one bit a row: 12.5 MB for 10^8."""

    def __init__(self, num_rows: int):
        self.num_rows, self.count = num_rows, 0
        self._bits = np.zeros(-(-num_rows // 8), np.uint8)

    def add(self, rows: np.ndarray) -> None:
        """Add rows (int64, no row twice, none that is here)."""
        np.bitwise_or.at(self._bits, rows >> 3, _bit(rows))
        self.count += len(rows)

    def discard(self, rows: np.ndarray) -> None:
        """Remove rows (int64, no row twice, all of them here)."""
        np.bitwise_and.at(self._bits, rows >> 3, ~_bit(rows))
        self.count -= len(rows)

    def has(self, rows: np.ndarray) -> np.ndarray:
        """Which of the rows (int64) are here (bool)."""
        return (self._bits[rows >> 3] & _bit(rows)) != 0

    def missing(self, start: int, stop: int) -> np.ndarray:
        """Rows of start .. stop - 1 that are not here (int64, sorted)."""
        first = start >> 3
        bits = np.unpackbits(self._bits[first : (stop + 7) >> 3], bitorder="little")
        return np.flatnonzero(bits[start - 8 * first : stop - 8 * first] == 0) + start


def _bit(rows: np.ndarray) -> np.ndarray:
    return (np.uint8(1) << (rows & 7).astype(np.uint8)).astype(np.uint8)


def pack_rows(rows: np.ndarray) -> str:
    """Row numbers (int64, sorted, no row twice) as text: deflated runs, each a gap and a length."""
    rows = np.asarray(rows, np.int64)
    first = np.flatnonzero(np.diff(rows, prepend=-2) != 1)  # index of each run's first row
    starts, lengths = rows[first], np.diff(np.append(first, len(rows)))
    gaps = np.diff(starts, prepend=0)
    return base64.b64encode(zlib.compress(np.stack([gaps, lengths]).astype("<i8").tobytes())).decode()


def unpack_rows(text: str) -> np.ndarray:
    """The row numbers of `pack_rows` (int64, sorted)."""
    gaps, lengths = np.frombuffer(zlib.decompress(base64.b64decode(text)), "<i8").reshape(2, -1)
    before = np.cumsum(lengths) - lengths  # rows in the runs before each
    return np.repeat(np.cumsum(gaps) - before, lengths) + np.arange(lengths.sum())
