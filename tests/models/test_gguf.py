"""The real demo model, from its GGUF file: logits equal those of transformers, fused and unfused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from rayinfer.config import EngineConfig
from rayinfer.errors import ConfigError
from rayinfer.models.load import inspect_model, load_model

FILE = Path(__file__).resolve().parents[2] / ".cache" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def reference():
    model = AutoModelForCausalLM.from_pretrained(FILE.parent, gguf_file=FILE.name, dtype=torch.float32)
    return model.eval()


def test_info():
    info = inspect_model(EngineConfig(model=str(FILE), device="cpu"))
    assert (info.architecture, info.num_layers, info.hidden_size) == ("LlamaForCausalLM", 30, 576)
    assert (info.vocab_size, info.max_position_embeddings, info.eos_token_ids) == (49152, 8192, (2,))
    assert info.dtype == torch.float32


def test_file_cut_short(tmp_path):
    (tmp_path / "cut.gguf").write_bytes(FILE.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match=r"cut\.gguf.*cut short"):
        inspect_model(EngineConfig(model=str(tmp_path / "cut.gguf"), device="cpu"))


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
def test_logits_equal_transformers(reference, run_rows, fuse):
    model = load_model(EngineConfig(model=str(FILE), device="cpu", fuse=fuse, max_model_len=256))
    assert (model.fused, model.dtype) == (fuse, torch.float32)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 49152, (n,), generator=generator).tolist() for n in (50, 33)]
    for row, logits in zip(rows, run_rows(model, rows, [40, 30], 16, block_size=16), strict=True):
        with torch.inference_mode():
            expected = reference(torch.tensor([row])).logits[0]
        assert expected.abs().max() > 10
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))
