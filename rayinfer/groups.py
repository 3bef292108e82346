"""Which running rows share a prefix that is worth reading once for all of them.

Rows share a prefix if their block tables begin with the same blocks: the prefix cache has seen to that. Rows may share
prefixes of several depths (a system prompt, then a document); one depth is taken for all, where the most is saved.
"""

import numpy as np

from rayinfer.request import Request

MAX_NUM_GROUPS = 128
MIN_SHARED_TOKENS = 128
MIN_SAVING = 0.1  # of the tokens that would be read; below it, the second pass costs more than it saves
_MOST_DEPTHS = 16
_REGROUP_STEPS = 16  # rows that share a new prefix wait that many steps at most until they are a group


class PrefixGroups:
    """The prefix groups of a scheduler's running rows; `Request.group` says which one a row is in.

    Attributes:
        lens_G: int32 [G], tokens that each group's rows share.
    """

    def __init__(self, block_size: int):
        self.lens_G = np.zeros(0, np.int32)
        self._block_size = block_size
        self._found: dict[tuple[int, int], tuple[int, list[int]]] = {}  # (number, last) of shared blocks -> group, all
        self._num_alone = self._num_steps = 0  # rows that came since groups were found and are in none, and steps

    def join(self, request: Request) -> None:
        """Put a row that came into the group whose blocks its own begin with, if there is one."""
        blocks, request.group = request.blocks, -1
        for num in {num for num, _ in self._found if num <= len(blocks)}:
            group, shared = self._found.get((num, blocks[num - 1]), (-1, blocks))
            if blocks[:num] == shared:
                request.group = group
        self._num_alone += request.group < 0

    def order(self, decodes: list[Request], running: list[Request]) -> None:
        """Put decode rows that share a prefix side by side, groups first; find the groups anew if rows are in none."""
        self._num_steps += self._num_alone > 0
        if self._num_alone * 8 > len(decodes) or self._num_steps > _REGROUP_STEPS:
            self._find(decodes, running)
        if len(self.lens_G):
            decodes.sort(key=lambda request: request.group if request.group >= 0 else MAX_NUM_GROUPS)

    def _find(self, decodes: list[Request], running: list[Request]) -> None:
        self.lens_G, self._num_steps = self.lens_G[:0], 0
        self._found.clear()
        if any(request.num_cached_tokens >= MIN_SHARED_TOKENS for request in decodes):
            width = max(request.num_registered_blocks for request in decodes)
            table = np.zeros((len(decodes), width), np.int32)
            for row, request in zip(table, decodes, strict=True):
                row[: request.num_registered_blocks] = request.blocks[: request.num_registered_blocks]
            group_B, shared_G = find_groups(table, self._block_size)
            self.lens_G = shared_G * self._block_size
            for request, group in zip(decodes, group_B.tolist(), strict=True):
                if group >= 0:
                    num = int(shared_G[group])
                    self._found[num, request.blocks[num - 1]] = group, request.blocks[:num]
        for request in running:  # those that do not decode yet, too
            self.join(request)
        self._num_alone = sum(request.group < 0 for request in running) - sum(request.group < 0 for request in decodes)


def find_groups(table_RP: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Group rows by the blocks their tables begin with.

    Args:
        table_RP: int32, blocks of each row that may be shared, then zeros.

    Returns:
        int32 [R], the group of each row, -1 for rows alone; int32 [G], blocks that each group's rows share. G is at
        most MAX_NUM_GROUPS, and 0 if grouping is not worth while.
    """
    group_R, none = np.full(len(table_RP), -1, np.int32), np.zeros(0, np.int32)
    num_blocks_R = (table_RP != 0).sum(1)
    most = int(num_blocks_R.max(initial=0))
    if len(table_RP) < 2 or most * block_size < MIN_SHARED_TOKENS:
        return group_R, none
    table_RP = np.ascontiguousarray(table_RP[:, :most])
    order_R = np.argsort(table_RP.view(np.dtype((np.void, 4 * most))).ravel())
    sorted_RP, num_R = table_RP[order_R], num_blocks_R[order_R]
    differ = sorted_RP[1:] != sorted_RP[:-1]
    common = np.where(differ.any(1), differ.argmax(1), most)  # with the row before
    common = np.minimum(common, np.minimum(num_R[1:], num_R[:-1]))
    depths, counts = np.unique(common[common * block_size >= MIN_SHARED_TOKENS], return_counts=True)
    best: tuple[int, list[tuple[int, int, int]]] = (0, [])
    for depth in depths[np.argsort(-counts * depths)][:_MOST_DEPTHS]:
        joined = np.concatenate([[False], common >= depth, [False]])
        starts = np.flatnonzero(~joined[:-1] & joined[1:])
        stops = np.flatnonzero(joined[:-1] & ~joined[1:]) + 1
        groups = [(int(a), int(b), int(common[a : b - 1].min())) for a, b in zip(starts, stops, strict=True)]
        groups = sorted(groups, key=lambda g: (g[0] - g[1] + 1) * g[2])[:MAX_NUM_GROUPS]
        best = max(best, (sum((b - a - 1) * shared for a, b, shared in groups), groups), key=lambda found: found[0])
    saved, groups = best
    if saved < MIN_SAVING * num_blocks_R.sum():
        return group_R, none
    for number, (start, stop, _) in enumerate(groups):
        group_R[order_R[start:stop]] = number
    return group_R, np.array([shared for *_, shared in groups], np.int32)
