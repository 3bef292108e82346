"""Prefix groups against a search through all depths, and what they do to an engine's tokens."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayinfer import SamplingParams, groups
from rayinfer.kv_cache import BlockPool
from rayinfer.request import Request
from rayinfer.scheduler import Scheduler

tables = st.lists(st.lists(st.integers(1, 2), min_size=0, max_size=5), min_size=1, max_size=12)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(groups, "MIN_SHARED_TOKENS", 1)
    monkeypatch.setattr(groups, "MIN_SAVING", 0.0)


def find(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    width = max(map(len, rows))
    return groups.find_groups(np.array([row + [0] * (width - len(row)) for row in rows], np.int32), 1)


def best_saving(rows: list[list[int]]) -> int:
    best = 0
    for depth in range(1, 6):
        members = defaultdict(list)
        for row in rows:
            if len(row) >= depth:
                members[tuple(row[:depth])].append(row)
        saved = 0
        for same in members.values():
            common = min(len(row) for row in same)
            while any(row[:common] != same[0][:common] for row in same):
                common -= 1
            saved += (len(same) - 1) * common
        best = max(best, saved)
    return best


@settings(deadline=None, max_examples=300)
@given(rows=tables)
def test_groups_share_what_they_say_and_save_the_most(rows):
    group_R, shared_G = find(rows)
    saved = 0
    for group, shared in enumerate(shared_G.tolist()):
        members = [row for row, number in zip(rows, group_R.tolist(), strict=True) if number == group]
        assert len(members) >= 2
        assert all(len(row) >= shared > 0 for row in members)
        assert len({tuple(row[:shared]) for row in members}) == 1
        saved += (len(members) - 1) * shared
    assert set(group_R.tolist()) <= set(range(-1, len(shared_G)))
    assert saved == best_saving(rows)


def test_nothing_worth_while(monkeypatch):
    monkeypatch.setattr(groups, "MIN_SAVING", 0.5)
    group_R, shared_G = find([[1, 1, 2, 2, 1], [1, 2, 1, 1, 1], [2, 1, 1, 1, 1]])
    assert group_R.tolist() == [-1, -1, -1]
    assert len(shared_G) == 0


def test_most_groups(monkeypatch):
    """Of too many groups, those that save the most stay."""
    monkeypatch.setattr(groups, "MAX_NUM_GROUPS", 2)
    rows = [[first] * length for first, length in ((1, 1), (2, 3), (3, 2)) for _ in range(3)]
    group_R, shared_G = find(rows)
    assert shared_G.tolist() == [3, 2]
    assert group_R.tolist() == [-1] * 3 + [0] * 3 + [1] * 3


def test_rows_that_come_later_join_their_group_at_once():
    """Three prefixes, rows in any order and more than slots: no decode row reads its prefix alone once it is cached."""
    scheduler = Scheduler(BlockPool(5000, 16), 16, 1000)
    rng = np.random.default_rng(0)
    prefixes = [rng.integers(0, 999, 160).tolist() for _ in range(3)]
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    for index in range(100):
        prompt = prefixes[rng.integers(3)] + [1000 + index] * 20
        scheduler.add(Request(str(index), prompt, params, max_total_tokens=189))
    alone = []
    while scheduler.running or scheduler.waiting:
        step = scheduler.schedule()
        alone.append((step.plan.shared_lens == 0).sum())
        for index in step.plan.samples.tolist():
            request = step.rows[index]
            request.num_pending -= 1
            request.output_token_ids.append(int(request.request_id) * 10 + len(request.output_token_ids))
            if request.num_known_tokens == request.max_total_tokens:
                scheduler.finish(request)
    assert sum(alone) == sum(alone[:4])  # before, most rows of each group read 8 of their 9 tokens' prefixes alone
