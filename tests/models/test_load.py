"""What is refused, when, and with which words; and what a loaded model knows about itself."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from rayinfer import LLM, SamplingParams, start
from rayinfer.config import EngineConfig
from rayinfer.engine import Engine
from rayinfer.errors import ConfigError, UnsupportedModelError
from rayinfer.models import load
from rayinfer.models.load import inspect_model, load_model
from rayinfer.models.paged import ATTENTION, discover
from rayinfer.models.source import weight_files

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(make_family, tmp_path) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(make_family("llama").folder, tmp_path / "model"))


@pytest.fixture
def sharded(make_family, tmp_path) -> Path:
    """The tiny Llama in several shards."""
    make_family("llama").reference().save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


def refuse(model, *words: str, error: type[Exception] = ConfigError, **kwargs) -> None:
    """inspect_model and load_model refuse alike, with all the words in the message."""
    config = EngineConfig(model=str(model), device="cpu", **kwargs)
    for function in (inspect_model, load_model):
        with pytest.raises(error) as caught:
            function(config)
        assert not [word for word in words if word not in str(caught.value)], str(caught.value)


def write_config(path: Path, **fields) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(fields))
    return path


def test_missing_folder(tmp_path):
    refuse(tmp_path / "nowhere", "nowhere", "no such folder")
    refuse("just-a-name", "just-a-name", "hub id")


def test_folder_without_config(tmp_path):
    refuse(tmp_path, "config.json")


def test_file_that_is_no_model(tmp_path):
    (tmp_path / "table.parquet").write_bytes(b"PAR1")
    refuse(tmp_path / "table.parquet", "not a .gguf")


def test_broken_config(folder):
    (folder / "config.json").write_text("{")
    refuse(folder, "config cannot be read")


def test_no_weights(folder):
    (folder / WEIGHTS).unlink()
    refuse(folder, "no weights", WEIGHTS)


def test_pickled_weights(folder):
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(state, folder / "pytorch_model.bin")
    refuse(folder, "pytorch_model.bin", "pickled", "safetensors", "load_format='pt'")


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("num_shards", [1, 2])
def test_pickled_weights_asked_for_by_name(make_family, run_rows, folder, num_shards):
    """They give transformers' logits; what is missing, cut short, or more than tensors is refused, and is not run."""
    reference = make_family("llama").reference()
    refuse(folder, "no weights", "pytorch_model.bin", load_format="pt")
    (folder / WEIGHTS).unlink()
    shards = {f"pytorch_model-{i}.bin": {} for i in range(num_shards)}
    weight_map = dict(zip(reference.state_dict(), itertools.cycle(shards), strict=False))
    for tensor, weight in reference.state_dict().items():
        shards[weight_map[tensor]][tensor] = weight
    if num_shards == 1:
        shards = {"pytorch_model.bin": reference.state_dict()}
    else:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for name, weights in shards.items():
        torch.save(weights, folder / name)
    row = [5, 7, 11, 13]
    model = load_model(EngineConfig(model=str(folder), device="cpu", load_format="pt"))
    (logits,) = run_rows(model, [row], [len(row)], 4)
    torch.testing.assert_close(logits, reference(torch.tensor([row])).logits[0], rtol=0, atol=1e-4)
    last = folder / list(shards)[-1]
    whole = last.read_bytes()
    last.write_bytes(whole[:-9])
    refuse(folder, last.name, "cut short", load_format="pt")
    torch.save({"lm_head.weight": Bomb(folder / "ran")}, last)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_model(EngineConfig(model=str(folder), device="cpu", load_format="pt"))
    assert not (folder / "ran").exists()
    last.unlink()
    refuse(folder, "pytorch_model", load_format="pt")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_file(folder, keep):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:keep])
    refuse(folder, WEIGHTS, str(len(whole) - 1 if keep == -1 else keep))


def test_truncated_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    refuse(sharded, shard.name)


def test_missing_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    refuse(sharded, shard.name, "missing")


def test_shard_without_a_tensor_of_the_index(sharded):
    index = json.loads((sharded / INDEX).read_text())
    name, shard = next(iter(index["weight_map"].items()))
    tensors = load_file(sharded / shard)
    del tensors[name]
    save_file(tensors, sharded / shard, metadata={"format": "pt"})
    refuse(sharded, name, shard)


def test_broken_index(sharded):
    (sharded / INDEX).write_text("{}")
    refuse(sharded, INDEX)


def test_weights_of_another_model_are_not_filled_with_noise(folder):
    """transformers gives missing tensors random values and a warning; here it is an error."""
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(EngineConfig(model=str(folder), device="cpu"))


def test_weights_of_another_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(ConfigError, match=r"cannot be loaded|do not fit"):
        load_model(EngineConfig(model=str(folder), device="cpu"))


def test_unknown_architecture(tmp_path):
    refuse(write_config(tmp_path / "m", model_type="warp9"), "warp9", error=UnsupportedModelError)


def test_no_model_type(tmp_path):
    refuse(write_config(tmp_path / "m", hidden_size=8), "model_type")


def test_code_of_its_own(tmp_path):
    auto_map = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.X"}
    refuse(write_config(tmp_path / "m", model_type="x", auto_map=auto_map), "trust_remote_code=True")


@pytest.mark.parametrize(
    ("model_type", "fields", "words"),
    [
        ("t5", {"num_layers": 1}, ["encoder-decoder"]),
        ("bart", {"encoder_layers": 1, "decoder_layers": 1}, ["encoder-decoder"]),
        ("vit", {}, ["vit", "not a causal language model"]),
        ("mamba", {}, ["MambaForCausalLM", "AttentionInterface"]),
        ("bloom", {}, ["BloomForCausalLM", "AttentionInterface"]),
        ("bert", {"is_decoder": False}, ["not causal"]),
        ("deepseek_v3", {"num_hidden_layers": 2, "n_routed_experts": 8, "hidden_size": 64}, ["sizes", "latent"]),
        ("gpt_oss", {"num_hidden_layers": 2, "num_local_experts": 2, "hidden_size": 64}, ["s_aux"]),
        ("granitemoehybrid", {}, ["linear_attention"]),
        ("diffllama", {}, ["DiffLlamaAttention", "several layers"]),
        ("mllama", {}, ["32 of 40 layers"]),
        ("lfm2", {"num_hidden_layers": 4, "full_attn_idxs": [1], "hidden_size": 64}, ["conv"]),
        ("falcon", {"num_hidden_layers": 2}, ["Falcon"]),
        ("llama4_text", {"num_hidden_layers": 4, "hidden_size": 64, "num_local_experts": 2}, ["chunked_attention"]),
        ("gemma3n_text", {"hidden_size": 64, "vocab_size_per_layer_input": 97}, ["shares keys and values"]),
    ],
)
def test_architectures_that_cannot_be_paged(tmp_path, model_type, fields, words):
    AutoConfig.for_model(model_type, **{"vocab_size": 97, **fields}).save_pretrained(tmp_path)
    refuse(tmp_path, *words, load_format="dummy", error=UnsupportedModelError)


def test_positions_of_its_own(tmp_path):
    """RoBERTa counts positions from padding_idx + 1; telling it 0, 1, 2, ... would be wrong in silence."""
    shape = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    AutoConfig.for_model("roberta", is_decoder=True, intermediate_size=32, **shape).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="RobertaForCausalLM numbers positions"):
        load_model(EngineConfig(model=str(tmp_path), load_format="dummy", device="cpu"))


def test_quantized_checkpoint(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    refuse(folder, "fp8", "unquantized", error=UnsupportedModelError)


def test_gguf_files(tmp_path):
    refuse(tmp_path / "model.gguf", "no such file")
    (tmp_path / "model.gguf").write_bytes(b"GGML" + bytes(64))
    refuse(tmp_path / "model.gguf", "not a GGUF file")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(64))
    refuse(tmp_path / "model.gguf", "header cannot be read")


def test_length_beyond_the_model(make_family):
    refuse(make_family("llama").folder, "max_model_len = 129", "128", max_model_len=129)


def test_dynamic_rope(make_family, run_rows):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    family, overrides = make_family("llama"), {"rope_parameters": rope, "max_position_embeddings": 128}
    config = EngineConfig(model=family.folder, hf_overrides=overrides, device="cpu")
    model = load_model(config)  # static as long as the model's own length is kept
    rows = [list(range(3, 40))]
    with torch.device("meta"):  # and then no forward reads the lengths: on meta tensors it could not
        discover(AutoModelForCausalLM.from_config(model.module.config, attn_implementation=ATTENTION))
    reference = family.reference(rope_parameters=rope)
    torch.testing.assert_close(
        run_rows(model, rows, [37], 16)[0], reference(torch.tensor(rows)).logits[0], rtol=0, atol=1e-4
    )


def test_longrope_needs_a_short_max_model_len(make_family, run_rows):
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32, "factor": 4.0,
        "short_factor": [1.0] * 6, "long_factor": [2.0] * 6,
    }  # fmt: skip
    family = make_family("phi3")
    overrides = {"rope_parameters": rope, "sliding_window": None, "original_max_position_embeddings": 32}
    refuse(family.folder, "longrope", "max_model_len=32", hf_overrides=overrides, error=UnsupportedModelError)
    model = load_model(EngineConfig(model=family.folder, hf_overrides=overrides, max_model_len=32, device="cpu"))
    rows = [list(range(3, 33))]
    reference = family.reference(**overrides)
    torch.testing.assert_close(
        run_rows(model, rows, [20], 7)[0], reference(torch.tensor(rows)).logits[0], rtol=0, atol=1e-4
    )


def test_hf_overrides(make_family):
    folder = make_family("gemma3").folder
    refuse(folder, "num_hiden_layers", "did you mean 'num_hidden_layers'", hf_overrides={"num_hiden_layers": 1})
    refuse(folder, "hf_overrides", hf_overrides={"num_hidden_layers": "many"})
    config = EngineConfig(model=folder, hf_overrides={"num_hidden_layers": 2}, device="cpu")
    assert inspect_model(config).num_layers == 2
    assert [spec.sliding_window for spec in load_model(config).specs] == [7, None]


def test_device_names(make_family):
    folder = make_family("llama").folder
    with pytest.raises(ConfigError, match="device = 'tpu'"):
        inspect_model(EngineConfig(model=folder, device="tpu"))


def test_dtype_follows_the_device(make_family):
    """The driver that inspects may lack the GPU that the engine will have."""
    folder = make_family("llama").folder
    for device, dtype, expected in [
        ("cpu", "auto", torch.float32),
        ("cuda", "auto", torch.bfloat16),
        ("cuda", "float16", torch.float16),
        ("cpu", "bfloat16", torch.bfloat16),
    ]:
        assert inspect_model(EngineConfig(model=folder, device=device, dtype=dtype)).dtype == expected


def test_the_gpu_becomes_the_current_one(make_family, monkeypatch):
    """Graphs and kernels are launched on the current GPU, wherever their tensors are."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def set_device(device):
        raise RuntimeError(device)

    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    with pytest.raises(RuntimeError, match="cuda:1"):
        load_model(EngineConfig(model=make_family("llama").folder, device="cuda:1"))
    with pytest.raises(ConfigError, match="device = 'cuda:2': torch sees 2 GPUs here"):
        load_model(EngineConfig(model=make_family("llama").folder, device="cuda:2"))


def test_info(make_family, tmp_path):
    folder = Path(shutil.copytree(make_family("qwen3").folder, tmp_path / "m"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    info = inspect_model(EngineConfig(model=str(folder), device="cpu"))
    assert info.architecture == "Qwen3ForCausalLM"
    assert (info.vocab_size, info.max_position_embeddings, info.num_layers, info.hidden_size) == (97, 128, 2, 48)
    assert info.eos_token_ids == (1, 7, 9)
    assert info.dtype == torch.float32
    (folder / "generation_config.json").unlink()
    assert inspect_model(EngineConfig(model=str(folder), device="cpu")).eos_token_ids == (1,)


def test_looked_at_once(make_family, monkeypatch):
    """An engine's start: the module tree is built without memory once, then with the weights."""
    built, build = [], load._from_config
    monkeypatch.setattr(load, "_from_config", lambda *args: built.append(args) or build(*args))
    config = EngineConfig(model=make_family("llama").folder, device="cpu", skip_tokenizer_init=True)
    Engine(config.model_copy(update={"cpu_kv_cache_gib": 0.01, "num_threads": 1}))
    assert len(built) == 1


def test_sharded_model_loads(sharded, make_family, run_rows):
    rows, prompts = [[3, 4, 5, 6, 7, 8]], [4]
    whole = run_rows(load_model(EngineConfig(model=make_family("llama").folder, device="cpu")), rows, prompts, 3)
    parts = run_rows(load_model(EngineConfig(model=str(sharded), device="cpu")), rows, prompts, 3)
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family_name", ["llama_biased", "smollm", "gemma3_vision", "qwen3_moe", "gpt2", "opt"])
def test_weights_that_were_read_ahead(make_family, family_name):
    """Whatever transformers does to a checkpoint's names and shapes, it does to these too; and none is kept."""
    config = EngineConfig(model=make_family(family_name).folder, device="cpu")
    weights: dict[str, torch.Tensor] = {}
    for path in weight_files(Path(config.model)):
        weights |= load_file(path)
    got, want = load_model(config, lambda info: weights), load_model(config)
    assert weights == {}
    ours, theirs = dict(got.module.named_parameters()), dict(want.module.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_reading_ahead_gives_what_safetensors_does(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "PIECE", 100)
    dtypes = itertools.cycle([torch.bfloat16, torch.float16, torch.float32])
    files, want = [tmp_path / name for name in ("a.safetensors", "b.safetensors")], {}
    for path, sizes in zip(files, ([(), (0, 4), (3, 7), (50,), (51, 2)], [(9, 5), (1,)]), strict=True):
        tensors = {f"{path.stem}.{i}": torch.randn(size).to(next(dtypes)) for i, size in enumerate(sizes)}
        save_file(tensors, path, metadata={"format": "pt"})
        want |= tensors
    read = partial(start._read_part, files, torch.device("cpu"))
    parts = [read(threading.Event(), part) for part in range(start.NUM_THREADS)]
    got = {name: tensor for part in parts for name, tensor in part.items()}
    assert sum(map(len, parts)) == len(got) == len(want)
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=0)
    stop = threading.Event()
    stop.set()
    with pytest.raises(InterruptedError):
        read(stop, 0)


def test_files_that_are_read_ahead(sharded, folder, tmp_path):
    assert weight_files(folder) == [folder / WEIGHTS]
    assert weight_files(sharded) == sorted(sharded.glob("*.safetensors"))
    assert weight_files(tmp_path) == weight_files(tmp_path / "none") == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="weights are read ahead for a GPU")
def test_a_start_reads_weights_ahead(sharded, make_family, monkeypatch):
    took: list[int] = []
    monkeypatch.setattr(
        load, "_pretrained", lambda *args, real=load._pretrained: took.append(len(args[-1])) or real(*args)
    )
    prompt, params = [{"prompt_token_ids": [3, 4, 5]}], SamplingParams(max_tokens=8, temperature=0, detokenize=False)
    small = dict(skip_tokenizer_init=True, gpu_memory_utilization=0.1, max_num_batched_tokens=64, max_num_seqs=4)
    tokens = LLM(str(sharded), **small).generate(prompt, params)[0].outputs[0].token_ids
    damaged = next(iter(sorted(sharded.glob("*.safetensors"))))
    damaged.write_bytes(damaged.read_bytes()[:-8])
    with pytest.raises(ConfigError, match="cut short"):
        LLM(str(sharded), **small)
    assert took == [len(load_file(make_family("llama").folder + "/" + WEIGHTS))]
    assert len(tokens) == 8


@pytest.mark.parametrize("family_name", ["llama", "gemma3", "smollm"])
def test_dummy_weights(make_family, tmp_path, family_name, run_rows):
    """Only a config.json is there; the same weights come every time, and norms start as transformers' do."""
    shutil.copy(Path(make_family(family_name).folder) / "config.json", tmp_path)
    config = EngineConfig(model=str(tmp_path), load_format="dummy", device="cpu", fuse=False)
    first, second = load_model(config), load_model(config)
    state = first.module.state_dict()
    tied = first.module.lm_head.weight is first.module.model.embed_tokens.weight
    assert tied == first.module.config.tie_word_embeddings == (family_name != "llama")
    for name, value in second.module.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    norms = {name: weight for name, weight in fresh.named_parameters() if weight.ndim == 1}
    assert norms
    for name, weight in norms.items():
        torch.testing.assert_close(state[name], weight.data)
    for name, buffer in fresh.named_buffers():
        torch.testing.assert_close(first.module.get_buffer(name), buffer)
    assert 0.015 < state["model.layers.0.mlp.up_proj.weight"].std() < 0.025
    rows = [[3, 4, 5, 6, 7]]
    fused = load_model(EngineConfig(model=str(tmp_path), load_format="dummy", device="cpu"))
    assert fused.fused
    torch.testing.assert_close(run_rows(first, rows, [3], 2), run_rows(fused, rows, [3], 2), rtol=0, atol=1e-5)


def test_hub_id_through_the_cache(make_family, tmp_path):
    """A hub id, offline: found when its files are in the cache, refused with the reason when they are not."""
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / "abc"
    shutil.copytree(make_family("llama").folder, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    code = """
from rayinfer.config import EngineConfig
from rayinfer.errors import ConfigError
from rayinfer.models.load import inspect_model, load_model
print(load_model(EngineConfig(model="org/tiny", device="cpu")).info.architecture)
for name in ("org/absent", "org/tiny"):
    try:
        inspect_model(EngineConfig(model=name, device="cpu", revision="other" if name == "org/tiny" else None))
    except ConfigError as error:
        print("refused", name in str(error))
"""
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=400, check=True)
    assert run.stdout.split("\n")[:3] == ["LlamaForCausalLM", "refused True", "refused True"], run.stdout
