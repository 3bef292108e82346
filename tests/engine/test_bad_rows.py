"""One bad row costs one row: each error of the engine, with neighbours that never notice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rayinfer import LLM, SamplingParams
from rayinfer.errors import ConfigError, ErrorType, RowError
from tests.engine.tiny import VOCAB, as_rows, ids_of, random_prompts

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
GOOD = [{"prompt": "the end of it"}, {"prompt": "é 🙂"}, {"prompt_token_ids": [5, 6, 7]}]
BOOM = "{% if m.content == 'boom' %}{{ raise_exception('no') }}{% endif %}"
TEMPLATE = "{% for m in messages %}" + BOOM + "{{ m.content }}{% endfor %}"
BAD = [
    ({"prompt": ""}, "INVALID_PROMPT", "is empty"),
    ({"prompt": None}, "INVALID_PROMPT", "all None or missing"),
    ({}, "INVALID_PROMPT", "one of messages, prompt, prompt_token_ids"),
    ({"prompt": "a", "prompt_token_ids": [5]}, "INVALID_PROMPT", "both set"),
    ({"prompt": 7}, "INVALID_PROMPT", "want a string, got int"),
    ({"prompt": [5, 6]}, "INVALID_PROMPT", "want a string, got list"),
    ({"prompt": "\ud800"}, "INVALID_PROMPT", "tokenizer refused"),
    ({"prompt": "ZZ"}, "INVALID_PROMPT", "has no tokens"),  # bytes that the tokenizer lacks
    ({"prompt": "the <extra>"}, "INVALID_TOKEN_IDS", "tokens that the model lacks: 97 is out of the vocabulary, 0 to"),
    ({"messages": [{"role": "user", "content": "<extra>"}]}, "INVALID_TOKEN_IDS", "97 is out of the vocabulary"),
    ({"prompt_token_ids": []}, "INVALID_PROMPT", "not empty"),
    ({"prompt_token_ids": [5.5]}, "INVALID_PROMPT", "integers"),
    ({"prompt_token_ids": [[5], [6, 7]]}, "INVALID_PROMPT", "integers"),
    ({"prompt_token_ids": "5 6"}, "INVALID_PROMPT", "integers"),
    ({"prompt_token_ids": [5, True, None]}, "INVALID_PROMPT", "integers"),
    ({"prompt_token_ids": [5, 10**30]}, "INVALID_PROMPT", "integers"),
    ({"prompt_token_ids": [5, 97]}, "INVALID_TOKEN_IDS", "97 is out of the vocabulary, 0 to 96"),
    ({"prompt_token_ids": [-1]}, "INVALID_TOKEN_IDS", "-1 is out"),
    ({"prompt_token_ids": np.arange(3, 63)}, "PROMPT_TOO_LONG", "60 tokens; at most 59 fit"),
    ({"messages": []}, "INVALID_PROMPT", "list of {role, content}"),
    ({"messages": "hello"}, "INVALID_PROMPT", "list of {role, content}"),
    ({"messages": [{"content": "x"}]}, "INVALID_PROMPT", r"messages\[0\]: want a mapping with a string `role`"),
    ({"messages": [{"role": "user", "content": 5}]}, "INVALID_PROMPT", r"messages\[0\].content: want a string"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "INVALID_PROMPT", "only parts of type text"),
    ({"messages": [{"role": "user", "content": "boom"}]}, "TEMPLATE_ERROR", "no"),
    ({"prompt": "x", "sampling_params": {"temprature": 1}}, "INVALID_SAMPLING_PARAMS", "did you mean 'temperature'"),
    ({"prompt": "x", "sampling_params": {"top_p": 2}}, "INVALID_SAMPLING_PARAMS", "top_p = 2"),
    ({"prompt": "x", "sampling_params": {"stop_token_ids": [97]}}, "INVALID_SAMPLING_PARAMS", "97 is out"),
    ({"prompt": "x", "sampling_params": 5}, "INVALID_SAMPLING_PARAMS", "want a mapping, got int"),
    ({"prompt": "x", "multi_modal_data": {"image": 1}}, "INVALID_PROMPT", "unknown key 'multi_modal_data'.* prompt, "),
    ({"promt": "x"}, "INVALID_PROMPT", "unknown key 'promt'; did you mean 'prompt'.*Allowed keys: prompt, prompt_tok"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, folder_of, tokenizer) -> str:
    """The tiny Llama with a tokenizer cut down to its vocabulary, and a chat template that can fail."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("bad_rows")
    used = sorted({c for text in ("the end of it", "é 🙂", "hello boom x") for c in tokenizer.tokenize(text)})
    pieces = sorted({piece for token in used for piece in token})
    vocab = {piece: 3 + id for id, piece in enumerate(pieces)} | {"<extra>": VOCAB}  # one more than the model has
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.add_tokens(["<extra>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=TEMPLATE)
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (path / name).write_bytes((path.__class__(folder_of("llama")) / name).read_bytes())
    fast.save_pretrained(path)
    return str(path)


@pytest.fixture
def llm(make_llm, folder) -> LLM:
    return make_llm(folder, skip_tokenizer_init=False, max_model_len=60, block_size=4)


def _run_rows(llm, rows, on_error="record"):
    """generate() and chat() both end here; messages, too, are one of a row's inputs."""
    return llm._run([dict(row) for row in rows], GREEDY, llm.engine.inputs, False, on_error)


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_every_bad_row_is_recorded(llm, run_ahead):
    llm.engine.runner.run_ahead = run_ahead
    want = ids_of(_run_rows(llm, GOOD))
    bad = [row for row, _, _ in BAD]
    outputs = _run_rows(llm, [GOOD[0], *bad[:10], GOOD[1], *bad[10:], GOOD[2]])
    assert [ids_of(outputs)[index] for index in (0, 11, -1)] == want
    assert all(len(tokens) == 8 for tokens in want)
    failed = [output for output in outputs if output.error_type is not None]
    assert [output.error_type for output in failed] == [kind for _, kind, _ in BAD]
    for output, row in zip(failed, bad, strict=True):
        assert isinstance(row.get("prompt"), str) <= (output.prompt == row.get("prompt"))  # kept, so that it is known
        assert output.outputs[0].finish_reason == "error"
        assert output.outputs[0].token_ids == []
        assert output.error_message
    assert {output.error_type for output in failed} >= set(ErrorType) - {
        "PREPROCESS_ERROR", "POSTPROCESS_ERROR", "NAN_LOGITS", "ABORTED", "ENGINE_CRASH"
    }  # fmt: skip


@pytest.mark.parametrize(("row", "kind", "text"), BAD)
def test_raise_names_the_row(llm, row, kind, text):
    with pytest.raises(RowError, match=text) as caught:
        _run_rows(llm, [GOOD[0], row, GOOD[1]], on_error="raise")
    assert str(caught.value).startswith("prompt 1: ")
    assert caught.value.type == kind
    assert [output.error_type for output in _run_rows(llm, GOOD)] == [None] * 3


def test_generate_and_chat(llm):
    """Strings, mappings and conversations give what their rows give."""
    assert ids_of(llm.generate("the end of it", GREEDY, use_tqdm=False)) == ids_of(_run_rows(llm, GOOD[:1]))
    messages = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    chat = llm.chat(messages, GREEDY, use_tqdm=False)
    assert chat[0].prompt == "hello"
    assert ids_of(chat) == ids_of(llm.generate(["hello"], GREEDY, use_tqdm=False))
    rows = [{"prompt": "hello", "multi_modal_data": None}, {"prompt": "hello", 7: 1}]
    none, seven = llm.generate(rows, GREEDY, use_tqdm=False)
    assert (none.error_type, ids_of([none])) == (None, ids_of(chat))
    assert "unknown key '7'" in seven.error_message
    assert [output.error_type for output in llm.chat("hello", GREEDY, use_tqdm=False)] == ["INVALID_PROMPT"]
    two = llm.chat([messages, []], GREEDY, use_tqdm=False)
    assert [output.error_type for output in two] == [None, "INVALID_PROMPT"]
    other = llm.chat(messages, GREEDY, chat_template="{{ messages[0].content }} x", use_tqdm=False)
    assert other[0].prompt == "hello x"
    assert llm.generate([], GREEDY, use_tqdm=False) == llm.chat([], GREEDY, use_tqdm=False) == []
    with pytest.raises(ConfigError, match="sampling_params has 1 entries for 2 prompts"):
        llm.generate(["a", "b"], [GREEDY], use_tqdm=False)
    with pytest.raises(ConfigError, match="on_error = 'skip'"):
        llm.generate(["a"], GREEDY, use_tqdm=False, on_error="skip")


def test_calls_need_no_content(llm):
    """An assistant's message as the OpenAI API returns it: calls, and content None, which is as good as empty."""
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    output = llm.chat(messages, GREEDY, use_tqdm=False)[0]
    assert (output.error_type, output.prompt) == (None, "hello")


def test_no_tokenizer(make_llm):
    llm = make_llm("llama")
    rows = [{"prompt": "a"}, {"prompt_token_ids": [5], "sampling_params": {"stop": "x"}}, {"prompt_token_ids": [5]}]
    outputs = llm.generate(rows, GREEDY, use_tqdm=False)
    assert [output.error_type for output in outputs] == ["INVALID_PROMPT", "INVALID_SAMPLING_PARAMS", None]
    assert "skip_tokenizer_init" in outputs[0].error_message
    assert outputs[2].outputs[0].text == ""
    assert [output.prompt_token_ids for output in outputs] == [[], [5], [5]]  # a failed row's too, if it has some


NAN_TOKEN = 41


@pytest.fixture(scope="module")
def nan_folder(tmp_path_factory, folder_of) -> str:
    """The tiny Llama, but one token's embedding is NaN."""
    path = tmp_path_factory.mktemp("nan")
    source = path.__class__(folder_of("llama"))
    for name in ("config.json", "generation_config.json"):
        (path / name).write_bytes((source / name).read_bytes())
    weights = load_file(source / "model.safetensors")
    weights["model.embed_tokens.weight"][NAN_TOKEN] = float("nan")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return str(path)


@pytest.mark.parametrize("run_ahead", [0, 1])
@pytest.mark.parametrize("cut", [{"block_size": 4}, {"block_size": 16, "max_num_batched_tokens": 7}])
def test_nan_stays_in_its_row(make_llm, reference_of, nan_folder, cut, run_ahead):
    """Rows whose prompt or answer holds the token fail; the others equal the model without it, sampled or greedy."""
    prompts = [[t for t in prompt if t != NAN_TOKEN] for prompt in random_prompts(8, 8, 30)]
    whole = make_llm("llama", run_ahead, **cut)
    sampled = SamplingParams(temperature=1.0, seed=3, max_tokens=20, ignore_eos=True, logprobs=2)
    params = [GREEDY.model_copy(update={"max_tokens": 20}), sampled] * 4
    want = ids_of(whole.generate(as_rows(prompts), params, use_tqdm=False))
    assert want[0] == reference_of("llama").generate(prompts[0], 20, eos_token_id=-1)
    poisoned = [prompt[:6] + [NAN_TOKEN] + prompt[6:] for prompt in prompts[:4]]
    mixed = [row for pair in zip(prompts[:4], poisoned, strict=True) for row in pair] + prompts[4:]
    mixed_params = [p for p in params[:4] for _ in (0, 1)] + params[4:]
    llm = make_llm(nan_folder, run_ahead, **cut)
    for _ in range(2):  # the second time with a prefix cache that must not hold NaN
        outputs = llm.generate(as_rows(mixed), mixed_params, use_tqdm=False)
        for output in outputs[1:8:2]:
            assert output.error_type == "NAN_LOGITS"
            assert output.outputs[0].finish_reason == "error"
            assert output.outputs[0].text == ""
        for output, tokens in zip(outputs[0:8:2] + outputs[8:], want, strict=True):
            got = output.outputs[0].token_ids
            if NAN_TOKEN in tokens[:-1]:  # the row itself drew the token, and could not go on
                assert output.error_type == "NAN_LOGITS"
                assert got == tokens[: tokens.index(NAN_TOKEN) + 1]
            else:
                assert output.error_type is None
                assert got == tokens
    assert any(NAN_TOKEN in tokens[:-1] for tokens in want), "some row should draw the token"


def test_nan_blocks_leave_the_prefix_cache(make_llm, nan_folder):
    """The same poisoned prompt again computes all of it, and so does a row that shares its clean beginning."""
    llm = make_llm(nan_folder, block_size=4)
    prompt = [NAN_TOKEN if i == 9 else 50 + i for i in range(16)]
    for _ in range(2):
        output = llm.generate(as_rows([prompt]), GREEDY, use_tqdm=False)[0]
        assert (output.error_type, output.num_cached_tokens) == ("NAN_LOGITS", 0)
    pool, caches = llm.engine.pool, llm.engine.model._state.caches
    assert not caches[0].k_NSKD.isfinite().all(), "the freed blocks do hold NaN"
    clean = llm.generate(as_rows([prompt[:8] + [5, 6, 7]]), GREEDY, use_tqdm=False)[0]
    assert (clean.error_type, clean.num_cached_tokens) == (None, 0)
    known = [block for block, _ in pool._known.values()]
    assert known
    assert all(cache.k_NSKD[known].isfinite().all() for cache in caches)


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_nan_raises_with_the_row_number(make_llm, nan_folder, run_ahead):
    llm = make_llm(nan_folder, run_ahead)
    rows = as_rows([[5, 6], [7, 8], [9, NAN_TOKEN], [10]])
    with pytest.raises(RowError, match=r"^prompt 2: .*NaN") as caught:
        llm.generate(rows, GREEDY, use_tqdm=False, on_error="raise")
    assert caught.value.type == ErrorType.NAN_LOGITS
    assert not llm.engine.has_work
    outputs = llm.generate(rows[:2], GREEDY, use_tqdm=False)
    assert [output.error_type for output in outputs] == [None, None]


@pytest.mark.parametrize("num_launches", [0, 3])
def test_interrupt_leaves_the_engine_usable(make_llm, reference_of, num_launches):
    """Ctrl-C in the middle of a step: its KV was not written, and the same prompts again must not find it."""
    llm = make_llm("llama", run_ahead=1, block_size=4, max_num_batched_tokens=24)
    prompts = random_prompts(5, 20, 30)
    launch = llm.engine.runner.launch

    def interrupted(plan):
        if llm.engine.stats.num_steps == num_launches:
            raise KeyboardInterrupt
        return launch(plan)

    llm.engine.runner.launch = interrupted
    with pytest.raises(KeyboardInterrupt):
        llm.generate(as_rows(prompts), GREEDY, use_tqdm=False)
    assert not llm.engine.has_work
    llm.engine.runner.launch = launch
    want = [reference_of("llama").generate(prompt, 8, eos_token_id=-1) for prompt in prompts]
    assert ids_of(llm.generate(as_rows(prompts), GREEDY, use_tqdm=False)) == want


def test_an_id_is_given_once(make_llm, reference_of):
    """A second row under the id of one that runs is refused; the others go on."""
    prompts = random_prompts(4)
    engine = make_llm("llama", run_ahead=1, block_size=4).engine
    for index, prompt in enumerate(prompts):
        engine.add(str(index), engine.inputs.encode_batch([{"prompt_token_ids": prompt, "sampling_params": GREEDY}])[0])
    with pytest.raises(ValueError, match="request_id = '1'"):
        engine.add("1", engine.inputs.encode_batch([{"prompt_token_ids": [5]}])[0])
    outputs = {}
    while engine.has_work:
        outputs.update({output.request_id: output.outputs[0].token_ids for output in engine.step()})
    assert sorted(outputs) == ["0", "1", "2", "3"]
    for index in range(4):
        assert outputs[str(index)] == reference_of("llama").generate(prompts[index], 8, eos_token_id=-1)


def test_logits_of_the_wrong_sign_of_infinity(make_llm, folder_of, tmp_path):
    """Logits that are all -inf, or hold +inf, are NAN_LOGITS too."""
    source = tmp_path.__class__(folder_of("llama"))
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = torch.full((VOCAB, 48), float("inf"))
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    outputs = make_llm(str(tmp_path)).generate(as_rows([[5], [6, 7]]), GREEDY, use_tqdm=False)
    assert [output.error_type for output in outputs] == ["NAN_LOGITS"] * 2
