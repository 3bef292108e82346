"""The torch sampler against transformers' logits warpers, softmax frequencies and IEEE arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rayinfer import SamplingParams
from rayinfer.sampler import logprobs
from rayinfer.sampler.reference import greedy, gumbel, sample
from tests.engine.tiny import as_rows, ids_of, random_prompts

FILTERS = [
    (1.0, 0, 1.0, 0.0),
    (0.5, 3, 1.0, 0.0),
    (1.5, 0, 0.7, 0.0),
    (1.0, 0, 1.0, 0.2),
    (0.8, 20, 0.9, 0.05),
    (2.0, 5, 0.5, 0.5),
    (1.0, 1, 1.0, 0.0),
    (1.0, -1, 1e-6, 0.0),
    (1.0, 10**6, 0.999, 1.0),
    (1.0, 2**31 - 1, 1.0, 0.0),
]


def _sample(logits_RV, rows, seeds, positions):
    """`rows` are (temperature, top_k, top_p, min_p)."""
    temperature, top_k, top_p, min_p = (torch.tensor(column) for column in zip(*rows, strict=True))
    return sample(logits_RV, temperature, top_k, top_p, min_p, torch.as_tensor(seeds), torch.as_tensor(positions))


def _warped(logits_V, temperature, top_k, top_p, min_p):
    """What transformers leaves of the logits, in our order of the filters."""
    scores = TemperatureLogitsWarper(temperature)(None, logits_V[None])
    if top_k > 0:
        scores = TopKLogitsWarper(min(top_k, logits_V.numel()))(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p > 0:
        scores = MinPLogitsWarper(min_p)(None, scores)
    return scores[0]


@pytest.mark.parametrize("filters", FILTERS)
def test_draws_follow_transformers_filters(filters):
    """20,000 draws: no token outside of the kept set; chi-square against the softmax over it."""
    torch.manual_seed(1)
    logits_V = torch.randn(13) * 1.5
    num_draws = 20_000
    tokens = torch.cat(
        [
            _sample(logits_V.expand(2000, -1), [filters] * 2000, torch.full((2000,), 99), torch.arange(at, at + 2000))
            for at in range(0, num_draws, 2000)
        ]
    )
    want_V = _warped(logits_V, *filters).softmax(-1)
    got_V = tokens.long().bincount(minlength=13)
    assert not got_V[want_V == 0].any()
    kept = want_V > 0
    expected = want_V[kept].double() * num_draws
    often = expected >= 5
    chi2 = float(((got_V[kept][often] - expected[often]) ** 2 / expected[often]).sum())
    # The 99.99th percentile of chi-square with d degrees of freedom (Wilson and Hilferty's approximation).
    degrees = max(int(often.sum()) - 1, 1)
    limit = degrees * (1 - 2 / (9 * degrees) + 3.719 * (2 / (9 * degrees)) ** 0.5) ** 3
    assert chi2 < limit


@pytest.mark.parametrize("filters", FILTERS)
def test_kept_set_equals_transformers(filters):
    """On a larger vocabulary: 400 rows of equal logits draw from the kept set only, and the whole of small ones."""
    torch.manual_seed(2)
    logits_V = torch.randn(500) * 3
    kept = set((_warped(logits_V, *filters) > float("-inf")).nonzero().flatten().tolist())
    drawn = set(_sample(logits_V.expand(400, -1), [filters] * 400, torch.arange(400), torch.zeros(400).long()).tolist())
    assert drawn <= kept
    if len(kept) == 1:
        assert drawn == kept


def test_greedy_is_argmax():
    torch.manual_seed(0)
    logits_RV = torch.randn(50, 300)
    logits_RV[7, [250, 20, 90]] = 9.0
    want = logits_RV.argmax(-1).tolist()
    want[7] = 20
    assert greedy(logits_RV).tolist() == want
    assert _sample(logits_RV, [(0.0, 5, 0.5, 0.1)] * 50, [3] * 50, [1] * 50).tolist() == want
    for dtype in (torch.bfloat16, torch.float16):
        assert greedy(logits_RV.to(dtype)).tolist() == logits_RV.to(dtype).float().argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-30, 1e-38, 1e-45])
def test_tiny_temperature_is_greedy(temperature):
    """Logits divided by it overflow; the likeliest token still wins."""
    torch.manual_seed(0)
    logits_RV = torch.cat([torch.randn(20, 50) * 5, torch.randn(20, 50) - 30])
    got = _sample(logits_RV, [(temperature, 0, 1.0, 0.0), (temperature, 9, 0.9, 0.1)] * 20, range(40), [5] * 40)
    assert got.tolist() == logits_RV.argmax(-1).tolist()


@pytest.mark.parametrize("filters", [(0.0, 0, 1.0, 0.0), *FILTERS[:6]])
def test_bad_rows_leave_neighbours_alone(filters):
    torch.manual_seed(0)
    clean = torch.randn(6, 40)
    bad = clean.clone()
    bad[1, 39] = float("nan")
    bad[2] = float("-inf")
    bad[3] = float("nan")
    bad[4, 0] = float("inf")
    rows, seeds, positions = [filters] * 6, [4] * 6, list(range(6))
    got, want = (_sample(x, rows, seeds, positions).tolist() for x in (bad, clean))
    assert got == [want[0], -1, -1, -1, -1, want[5]]
    assert -1 not in want


def test_masked_tokens_are_never_drawn():
    logits_RV = torch.full((200, 30), float("-inf"))
    logits_RV[:, [3, 17]] = torch.tensor([0.0, 1.0])
    rows = [FILTERS[i] for i in (0, 2, 3, 5)] * 50
    assert set(_sample(logits_RV, rows, [1] * 200, range(200)).tolist()) == {3, 17}


def test_row_draws_the_same_in_any_batch():
    torch.manual_seed(0)
    logits_RV = torch.randn(30, 200)
    rows = [FILTERS[i % len(FILTERS)] for i in range(30)]
    seeds, positions = torch.randint(0, 2**62, (30,)), torch.randint(0, 5000, (30,))
    together = _sample(logits_RV, rows, seeds, positions).tolist()
    order = torch.randperm(30)
    shuffled = _sample(logits_RV[order], [rows[i] for i in order], seeds[order], positions[order]).tolist()
    assert [together[i] for i in order] == shuffled
    for i in range(30):
        assert _sample(logits_RV[i : i + 1], rows[i : i + 1], seeds[i : i + 1], positions[i : i + 1])[0] == together[i]


def test_equals_the_kernel():
    """The kernel's own tests compare it with plain torch; a row must draw the same on a CPU and on a GPU."""
    kernel = pytest.importorskip("rayinfer.kernels.sampling")
    torch.manual_seed(0)
    logits_RV = torch.randn(len(FILTERS), 700) * 2
    columns = [torch.tensor(column) for column in zip(*FILTERS, strict=True)]
    columns += [torch.randint(0, 2**62, (len(logits_RV),)), torch.randint(0, 9000, (len(logits_RV),))]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    got = kernel.sample(*(x.to(device) for x in (logits_RV, *columns)))
    assert got.tolist() == sample(logits_RV, *columns).tolist()


def test_noise_differs_by_seed_and_position():
    """Neighbouring seeds, positions and tokens give unrelated noise (correlation of 100,000 pairs within 0.02)."""
    zero = torch.zeros(1, dtype=torch.int64)
    base = gumbel(zero, zero, 100_000)[0]
    others = [
        gumbel(zero + seed, zero + at, 100_000)[0] for seed, at in ((1, 0), (0, 1), (2**32, 0), (1, 1), (2**62, 7))
    ]
    others.append(base.roll(1))
    for other in others:
        assert abs(torch.corrcoef(torch.stack([base, other]))[0, 1]) < 0.02
    assert gumbel(zero, zero, 100_000)[0].equal(base)


def test_noise_is_finite_and_gumbel():
    """10 million values: all finite; mean and variance those of the Gumbel distribution."""
    mean = var = 0.0
    for seed in range(10):
        noise = gumbel(torch.tensor([seed * 10**17 + 1]), torch.tensor([seed]), 1_000_000)
        assert noise.isfinite().all()
        mean, var = mean + noise.mean().item() / 10, var + noise.var().item() / 10
    assert mean == pytest.approx(0.5772157, abs=2e-3)
    assert var == pytest.approx(torch.pi**2 / 6, abs=5e-3)


def test_logprobs_equal_log_softmax():
    torch.manual_seed(0)
    logits_RV = (torch.randn(9, 50) * 4).bfloat16()
    token_R = torch.randint(0, 50, (9,))
    values, ids = logprobs(logits_RV, token_R, 4)
    want = logits_RV.float().log_softmax(-1)
    torch.testing.assert_close(values[:, 0], want.gather(1, token_R[:, None])[:, 0])
    assert values[:, 1].tolist() == [float((w > w[t]).sum() + 1) for w, t in zip(want, token_R, strict=True)]
    torch.testing.assert_close(values[:, 2:], want.topk(4).values)
    torch.testing.assert_close(want.gather(1, ids), values[:, 2:])
    assert logprobs(logits_RV, token_R, 0)[1].shape == (9, 0)


def test_logprobs_of_many_rows_take_the_memory_of_few():
    """Prompts' logits are many; what is computed from them, several times their size, is not there at once."""

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.size = max(self.size, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    logits_RV, token_R = torch.randn(300, 97).bfloat16(), torch.randint(97, (300,))
    with Largest() as largest:
        values, ids = logprobs(logits_RV, token_R, 4)
    assert largest.size <= 128 * 128  # rows, and the vocabulary to the next power of two
    for row in (0, 127, 128, 299):
        alone = logprobs(logits_RV[row : row + 1].clone(), token_R[row : row + 1], 4)
        assert torch.equal(values[row : row + 1], alone[0])
        assert torch.equal(ids[row : row + 1], alone[1])


def test_seeded_rows_through_the_engine(make_llm):
    """The same row gives the same tokens alone, in a batch, in another order, chunked or preempted."""
    prompts = random_prompts(7)
    params = [
        SamplingParams(temperature=1.2, seed=i % 3, top_k=(0, 20)[i % 2], top_p=0.95, max_tokens=15, ignore_eos=True)
        for i in range(7)
    ]
    llm = make_llm("llama", run_ahead=1, block_size=4)
    together = ids_of(llm.generate(as_rows(prompts), params, use_tqdm=False))
    assert ids_of(llm.generate(as_rows(prompts[::-1]), params[::-1], use_tqdm=False))[::-1] == together
    alone = [ids_of(llm.generate(as_rows([p]), s, use_tqdm=False))[0] for p, s in zip(prompts, params, strict=True)]
    assert alone == together
    small = make_llm("llama", block_size=4, num_gpu_blocks_override=20, max_model_len=76, max_num_batched_tokens=9)
    assert ids_of(small.generate(as_rows(prompts), params, use_tqdm=False)) == together
    assert small.engine.snapshot().num_preemptions > 0
    other = [p.model_copy(update={"seed": p.seed + 100}) for p in params]
    assert ids_of(llm.generate(as_rows(prompts), other, use_tqdm=False)) != together


def test_rows_without_a_seed(make_llm):
    """Equal prompts draw apart; a new engine with the same seed repeats them, one with another seed does not."""
    rows, params = as_rows([[5, 6, 7]] * 6), SamplingParams(temperature=1.5, max_tokens=12, ignore_eos=True)
    first, again, other = (
        ids_of(make_llm("llama", seed=seed).generate(rows, params, use_tqdm=False)) for seed in (3, 3, 4)
    )
    assert first == again
    assert len({tuple(ids) for ids in first + other}) == 12
