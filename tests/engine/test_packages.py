"""Attention by other packages against torch in float64 and, in a whole engine, transformers; refusals without a GPU."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from rayinfer import LLM, SamplingParams
from rayinfer.attention import LayerSpec, StepMeta, get_backend
from rayinfer.attention.packages import PACKAGES
from rayinfer.errors import ConfigError
from rayinfer.runner import Runner
from tests.engine.tiny import TINY, VOCAB, as_rows, ids_of
from tests.kernels.paged import TOLERANCE, make_paged, reference

CUDA = torch.device("cuda")
# (tokens in the cache, tokens of this step): decodes, one of them padding, then prompt chunks.
STEP = [(1, 1), (17, 1), (0, 1), (200, 1), (1000, 1), (5, 5), (300, 300), (129, 128), (700, 33), (64, 1)]
NUM_DECODES = 5
HEADS = [(8, 2, 128), (32, 8, 128), (6, 6, 64), (5, 1, 256), (14, 2, 80)]
WAYS = {
    "graphs": {},
    "eager": {"enforce_eager": True},
    "chunks": {"max_num_batched_tokens": 24, "enforce_eager": True},
    "prefill": {"decode_backend": "triton"},
    "decode": {"prefill_backend": "triton", "enforce_eager": True},
}


def installed(name: str) -> bool:
    for module in PACKAGES[name].modules:
        try:
            importlib.import_module(module)
            return True
        except ImportError:
            continue
    return False


@pytest.fixture(params=PACKAGES)
def name(request) -> str:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if not installed(request.param):
        pytest.skip(f"{request.param} is not installed")
    return request.param


def make_meta(paged, step, num_decodes: int) -> StepMeta:
    starts = torch.tensor([0, *(num for _, num in step)]).cumsum(0).int()
    return StepMeta(
        positions_T=torch.zeros(int(starts[-1]), dtype=torch.int64, device=CUDA),
        slot_mapping_T=torch.full((int(starts[-1]),), -1, device=CUDA),
        block_table_RP=paged.table_RP,
        seq_lens_R=paged.seq_lens_R,
        query_start_R1=starts.to(CUDA),
        num_decodes=num_decodes,
        max_seq_len=max(length for length, _ in step),
        max_query_len=max([num for _, num in step[num_decodes:]], default=1),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("head_major", [False, True])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (24, 20.0)])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), HEADS)
def test_mixed_step(name, num_heads, num_kv_heads, head_dim, window, softcap, head_major, block_size):
    """Every slot that no row owns is NaN; what a step does not compute keeps its value."""
    if head_dim not in PACKAGES[name].head_dims:
        pytest.skip("a head size that it refuses")
    torch.manual_seed(0)
    backend, dtype = get_backend(name, CUDA), torch.bfloat16
    spec = LayerSpec(0, num_heads, num_kv_heads, head_dim, head_dim**-0.5, window, softcap)
    backend.check(spec, dtype, block_size)
    lens = [length for length, _ in STEP]
    paged = make_paged(lens, num_kv_heads, head_dim, block_size, dtype, CUDA, head_major)
    meta = make_meta(paged, STEP, NUM_DECODES)
    starts = meta.query_start_R1.tolist()
    q_THD = torch.randn(starts[-1], num_heads, head_dim).to(dtype)
    out_THD = torch.full_like(q_THD, 7.0).to(CUDA)
    backend.prefill(q_THD.to(CUDA), paged.cache, spec, meta, out_THD)
    assert (out_THD[:NUM_DECODES] == 7.0).all()
    backend.decode(q_THD.to(CUDA), paged.cache, spec, meta, out_THD)
    for row, (k, v) in enumerate(zip(paged.keys, paged.values, strict=True)):
        if lens[row]:
            at = slice(starts[row], starts[row + 1])
            want = reference(q_THD[at].float(), k, v, spec.scale, window, softcap)
            close = dict(rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
            torch.testing.assert_close(out_THD[at].cpu().float(), want, **close, msg=lambda m: f"row {row}: {m}")  # noqa: B023


@pytest.mark.gpu
def test_in_a_graph():
    """FlashAttention's decodes, captured once for the longest row, then replayed for other rows."""
    if not torch.cuda.is_available() or not installed("flash_attn"):
        pytest.skip("needs a GPU and flash_attn")
    backend, spec = get_backend("flash_attn", CUDA), LayerSpec(0, 8, 2, 128, 128**-0.5)
    for lens in ([9, 0, 0, 0], [2000, 3, 777, 0]):
        paged = make_paged([2000, 3, 777, 1], 2, 128, 16, torch.bfloat16, CUDA, head_major=False)
        meta = make_meta(paged, [(2000, 1)] * 4, 4)
        q_THD = torch.randn(4, 8, 128, device=CUDA).to(torch.bfloat16)
        out_THD = torch.empty_like(q_THD)
        backend.decode(q_THD, paged.cache, spec, meta, out_THD)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            backend.decode(q_THD, paged.cache, spec, meta, out_THD)
        meta.seq_lens_R.copy_(torch.tensor(lens, dtype=torch.int32))
        q_THD.normal_()
        graph.replay()
        for row, length in enumerate(lens):
            if length:
                k, v = paged.keys[row][:length], paged.values[row][:length]
                want = reference(q_THD[row : row + 1].cpu().float(), k, v, spec.scale)
                torch.testing.assert_close(out_THD[row : row + 1].cpu().float(), want, rtol=3e-2, atol=3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama128", "gemma128"])
def test_tokens(name, folder_of, reference_of, family, way):
    """Each token is the likeliest that transformers knows in float32; float16 may take another of two that tie."""
    if name == "flashinfer" and way == "graphs":
        pytest.skip("the same as eager: test_backends_in_graphs")
    rng = np.random.default_rng(0)
    shared = rng.integers(3, VOCAB, 48).tolist()
    prompts = [shared[: 24 * (i % 3)] + rng.integers(3, VOCAB, 3 + i).tolist() for i in range(16)]
    settings = {**TINY, "device": "cuda", "dtype": "float16", "max_num_seqs": 8, "max_model_len": 128}
    backends = {"prefill_backend": name, "decode_backend": name}
    llm = LLM(folder_of(family), **{**settings, **backends, **WAYS[way]}, skip_tokenizer_init=True)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    lost = []
    for prompt, tokens in zip(prompts, ids_of(llm.generate(as_rows(prompts), params, use_tqdm=False)), strict=True):
        logprobs_8V = reference_of(family).logprobs(prompt + tokens[:-1])[len(prompt) - 1 :]
        lost += (logprobs_8V.amax(-1) - logprobs_8V[range(8), tokens]).tolist()
    assert max(lost) < 0.1
    assert np.mean(np.array(lost) == 0) > 0.9


@pytest.mark.parametrize("name", PACKAGES)
def test_refuses_what_is_not_there(name):
    with pytest.raises(ConfigError, match=f"{name} attention: device = cpu: only cuda is allowed"):
        get_backend(name, torch.device("cpu"))
    if not installed(name):
        with pytest.raises(ConfigError, match=rf"{name} attention: .* cannot be imported; .*pip install .* 'auto'"):
            get_backend(name, CUDA)


@pytest.mark.parametrize("name", PACKAGES)
def test_refuses_layers(name):
    spec = LayerSpec(0, 8, 2, 128, 0.1)
    PACKAGES[name].check(spec, torch.bfloat16, 16)
    with pytest.raises(ConfigError, match=r"dtype = torch.float32: float16 and bfloat16 are allowed.*'auto'"):
        PACKAGES[name].check(spec, torch.float32, 16)
    with pytest.raises(ConfigError, match=r"head_dim = 100: .* allowed.*'auto'"):
        PACKAGES[name].check(LayerSpec(0, 8, 2, 100, 0.1), torch.float16, 16)


@pytest.mark.parametrize(("name", "eager"), [("torch", False), ("triton", True), ("triton", False)])
def test_backends_in_graphs(folder_of, monkeypatch, name, eager):
    """A decode backend that reads lengths on the host runs without CUDA graphs, asked for or not."""
    asked, make = [], Runner.__init__
    monkeypatch.setattr(Runner, "__init__", lambda self, *args, **kw: asked.append(kw) or make(self, *args, **kw))
    backends = {"prefill_backend": "triton", "decode_backend": name, "enforce_eager": eager}
    LLM(folder_of("llama"), **TINY, **backends, skip_tokenizer_init=True)
    assert asked[0]["use_graphs"] == (name == "triton" and not eager)
    assert [PACKAGES[name].in_graphs for name in ("flash_attn", "flashinfer")] == [True, False]


@pytest.mark.gpu
def test_torch_on_a_gpu(folder_of):
    """The reference backend starts there too, and tells the tokens that it tells on a CPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    backends = {"prefill_backend": "torch", "decode_backend": "torch", "dtype": "float32"}
    prompts, params = as_rows([[5, 6, 7], [8]]), SamplingParams(temperature=0, max_tokens=8)
    settings = {**TINY, **backends, "max_num_seqs": 8, "max_model_len": 128, "skip_tokenizer_init": True}
    llms = [LLM(folder_of("llama"), **{**settings, "device": device}) for device in ("cpu", "cuda")]
    first, second = (ids_of(llm.generate(prompts, params, use_tqdm=False)) for llm in llms)
    assert first == second
