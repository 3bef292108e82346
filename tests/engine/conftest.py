"""Fixtures of the engine tests: model folders saved once a session, engines checked when a test ends."""

from __future__ import annotations

import functools

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rayinfer import LLM
from tests.engine.tiny import FAMILIES, TINY, Reference, check_blocks, save_model

MERGES = [("t", "h"), ("th", "e"), ("e", "n"), ("en", "d"), ("Ġ", "the"), ("Ċ", "Ċ"), ("Ã", "©")]


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """folder_of(family) -> folder of its tiny model, saved once a session."""

    @functools.cache
    def make(family: str) -> str:
        folder = str(tmp_path_factory.mktemp(family))
        save_model(folder, family)
        return folder

    return make


@pytest.fixture(scope="session")
def reference_of(folder_of):
    return functools.cache(lambda family: Reference(folder_of(family)))


@pytest.fixture
def make_llm(folder_of):
    """make_llm(family or folder, run_ahead=0, **EngineConfig fields) -> LLM that must end with all blocks free."""
    made = []

    def make(model: str, run_ahead: int = 0, **kwargs) -> LLM:
        defaults = {"skip_tokenizer_init": True, "max_num_seqs": 8}
        llm = LLM(folder_of(model) if model in FAMILIES else model, **{**TINY, **defaults, **kwargs})
        llm.engine.runner.run_ahead = run_ahead
        made.append(llm)
        return llm

    yield make
    for llm in made:
        check_idle(llm)


def check_idle(llm: LLM) -> None:
    """Nothing runs and every block is free."""
    engine = llm.engine
    assert not engine.has_work
    assert not engine.scheduler.running
    assert not engine.scheduler.waiting
    check_blocks(engine.pool, [])
    assert engine.pool.num_free == engine.pool.num_blocks - 1
    assert engine.pool.usage == 0


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges: most tokens are one byte, so other scripts are split over tokens."""
    pieces = ["<pad>", "<eos>", "<tool>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [left + right for left, right in MERGES]
    tokenizer = Tokenizer(models.BPE(vocab={piece: id for id, piece in enumerate(pieces)}, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in pieces[:3]])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
