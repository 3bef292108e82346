"""The block pool: which KV blocks are free, shared, or kept for rows to come.

A block holds the keys and values of `block_size` tokens of every layer. Block 0 is never given out: padding
points at it and nothing writes it, so it always reads as zeros.

Prefix caching: a full block is known under the key (id of the prefix before it, its tokens). Ids are never used
twice and the dictionary compares the tokens themselves, so neither a hash collision nor an evicted parent can
ever join a row to another row's KV. (The idea of chained block keys: vLLM's automatic prefix caching.)
"""

from collections import OrderedDict
from itertools import count

from rayinfer.request import Request

Key = tuple[int, tuple[int, ...]]


class BlockPool:
    """Fixed set of KV blocks with reference counts; allocate, free and share are O(1) a block.

    A block is in exactly one state: in use (ref_count > 0) or free. A free block may still be known to the prefix
    cache; it is taken again on a hit, and loses its content when it is the least recently freed and space is needed.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True):
        assert num_blocks >= 2, f"num_blocks = {num_blocks}: need at least 2, one is reserved for padding"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.ref_count = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._known: dict[Key, tuple[int, int]] = {}  # key -> (block, prefix id up to and with this block)
        self._key_of: dict[int, Key] = {}  # block -> key
        self._ids = count(1)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the blocks in use, 0 to 1."""
        return 1 - len(self._free) / (self.num_blocks - 1)

    def allocate(self, num: int) -> list[int]:
        """Take `num` free blocks; the caller has checked `num_free`."""
        blocks = [self._free.popitem(last=False)[0] for _ in range(num)]
        for block in blocks:
            self._forget(block)
            self.ref_count[block] = 1
        return blocks

    def release(self, request: Request, forget: bool = False) -> None:
        """Give back a row's blocks, the last first so that the deepest leave the prefix cache first.

        Args:
            forget: drop them from the prefix cache too (their content is not to be trusted).
        """
        for block in reversed(request.blocks):
            self.ref_count[block] -= 1
            if forget:
                self._forget(block)
            if self.ref_count[block] == 0:
                self._free[block] = None
                if block not in self._key_of:
                    self._free.move_to_end(block, last=False)
        request.blocks.clear()
        request.num_registered_blocks = request.prefix_id = 0

    def match(self, request: Request, num_tokens: int) -> list[int]:
        """Blocks that hold the longest known prefix of the row's first `num_tokens` tokens, without taking them.

        Without prefix caching no block is known.
        """
        found: list[int] = []
        size, prefix_id = self.block_size, 0
        for start in range(0, num_tokens - size + 1, size):
            if (entry := self._known.get((prefix_id, tuple(request.tokens(start, start + size))))) is None:
                break
            block, prefix_id = entry
            found.append(block)
        return found

    def share(self, request: Request, blocks: list[int]) -> None:
        """Give a row that has no blocks the known ones that `match` found."""
        for block in blocks:
            if self.ref_count[block] == 0:
                del self._free[block]
            self.ref_count[block] += 1
        request.blocks.extend(blocks)
        request.num_registered_blocks = len(blocks)
        if blocks:
            request.prefix_id = self._known[self._key_of[blocks[-1]]][1]

    def register(self, request: Request, num_tokens: int) -> None:
        """Make known the blocks that the row's first `num_tokens` tokens fill.

        They may be on their way to the device: a later step, or another row of the same step, reads them after
        they are written, because every layer stores the whole step's KV before it attends.
        """
        if not self.enable_prefix_caching:
            return
        size = self.block_size
        for index in range(request.num_registered_blocks, num_tokens // size):
            key = (request.prefix_id, tuple(request.tokens(index * size, (index + 1) * size)))
            if (entry := self._known.get(key)) is None:
                block = request.blocks[index]
                entry = self._known[key] = (block, next(self._ids))
                self._key_of[block] = key
            request.prefix_id = entry[1]
            request.num_registered_blocks = index + 1

    def reset_prefix_cache(self) -> None:
        """Forget all content (blocks in use stay in use)."""
        self._known.clear()
        self._key_of.clear()

    def _forget(self, block: int) -> None:
        if block in self._key_of:
            del self._known[self._key_of.pop(block)]
