"""How rows end: EOS, stop tokens, stop strings, limits; and that the text is tokenizer.decode of the ids.

The model is scripted: position p yields the script's token p, by its weights, so any text can be had from a real run.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from rayinfer import LLM, SamplingParams
from rayinfer.request import Request
from rayinfer.text import final_text, find_stop_string
from tests.engine.tiny import TINY

SCRIPT = "naïve 🙂🙂 the end, 日本語<tool> the the end\n\nfin<eos>after<eos>"
LENGTH = 80


def save_scripted(folder: str, script: list[int], vocab_size: int, eos: int) -> None:
    """A GPT-2 without attention or MLP to speak of: one-hot positions, and a head that maps them to the script."""
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=LENGTH, n_embd=LENGTH, n_layer=1, n_head=1, eos_token_id=eos,
        bos_token_id=eos, tie_word_embeddings=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
        model.transformer.wpe.weight.copy_(torch.eye(LENGTH))
        model.lm_head.weight[script, torch.arange(len(script))] = 1.0
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def scripted(tmp_path_factory, tokenizer) -> tuple[LLM, list[int]]:
    folder = str(tmp_path_factory.mktemp("scripted"))
    script = tokenizer(SCRIPT)["input_ids"]
    script += [0] * (LENGTH - len(script))
    save_scripted(folder, script, len(tokenizer), tokenizer.eos_token_id)
    tokenizer.save_pretrained(folder)
    return LLM(folder, **TINY, max_num_seqs=64), script


def _run(llm: LLM, *params: dict):
    every = [SamplingParams(**{"temperature": 0, "max_tokens": None, **p}) for p in params]
    return [o.outputs[0] for o in llm.generate([{"prompt_token_ids": [5]}] * len(every), every, use_tqdm=False)]


def _ends(completion) -> tuple:
    return completion.finish_reason, completion.stop_reason, completion.token_ids


def test_script_splits_characters(scripted, tokenizer):
    """What the tests below rest on."""
    llm, script = scripted
    assert tokenizer.decode(script[: script.index(tokenizer.eos_token_id)]) == SCRIPT[: SCRIPT.index("<eos>")]
    pieces = [tokenizer.decode([token]) for token in script]
    assert sum("\ufffd" in piece for piece in pieces) > 15, "characters are split over tokens"
    assert {" the", "end"} < set(pieces), "and there are tokens of several"
    assert not llm.engine.model.fused


def test_text_is_decode_of_the_ids(scripted, tokenizer):
    """Cut after any number of tokens, in the middle of a character too."""
    llm, script = scripted
    end = script.index(tokenizer.eos_token_id)
    for skip in (True, False):
        outputs = _run(llm, *({"max_tokens": n, "skip_special_tokens": skip} for n in range(1, end + 1)))
        for num, output in enumerate(outputs, start=1):
            assert _ends(output) == ("length", None, script[:num])
            assert output.text == tokenizer.decode(script[:num], skip_special_tokens=skip)
    assert any(output.text.endswith("\ufffd") for output in outputs)
    assert _run(llm, {"max_tokens": 9, "detokenize": False})[0].text == ""


def test_eos(scripted, tokenizer):
    llm, script = scripted
    end = script.index(tokenizer.eos_token_id) + 1
    plain, shown, kept, ignored = _run(
        llm,
        {},
        {"skip_special_tokens": False},
        {"skip_special_tokens": False, "include_stop_str_in_output": True},
        {"ignore_eos": True},
    )
    text = tokenizer.decode(script[: end - 1])
    for output in (plain, shown, kept):
        assert _ends(output) == ("stop", None, script[:end])
    assert plain.text == text.replace("<tool>", "")
    assert shown.text == text, "an ending token is no part of the text, special or not"
    assert kept.text == text + "<eos>"
    assert _ends(ignored) == ("length", None, script[: LENGTH - 1])
    assert ignored.text == tokenizer.decode(script[: LENGTH - 1], skip_special_tokens=True)


def test_the_tokenizers_eos_ends_a_row_and_one_out_of_the_vocabulary_harms_none(tokenizer, tmp_path):
    """As with vLLM; a fine-tune may have a new one in its tokenizer alone. A row with min_tokens met one of 9,999."""
    script = tokenizer(SCRIPT)["input_ids"]
    save_scripted(str(tmp_path), [*script, *[0] * (LENGTH - len(script))], len(tokenizer), 9999)
    tokenizer.save_pretrained(tmp_path)
    end = script.index(tokenizer.eos_token_id) + 1
    plain, least, ignored = _run(LLM(str(tmp_path), **TINY), {}, {"min_tokens": 3}, {"ignore_eos": True})
    assert _ends(plain) == _ends(least) == ("stop", None, script[:end])
    assert ignored.finish_reason == "length"


def test_pieces_of_logprobs(scripted, tokenizer, monkeypatch):
    """Each is the text of its token alone, which the tokenizer is asked for once."""
    llm, asked = scripted[0], []
    decode = llm.engine.tokenizer.decode
    monkeypatch.setattr(llm.engine.tokenizer, "decode", lambda ids, **kw: asked.append(ids) or decode(ids, **kw))
    for output in _run(llm, {"logprobs": 5}, {"logprobs": 2, "ignore_eos": True}):
        for entry in output.logprobs:
            assert [one.decoded_token for one in entry.values()] == [tokenizer.decode([token]) for token in entry]
    pieces = [ids[0] for ids in asked if len(ids) == 1]
    assert len(pieces) == len(set(pieces)) > 20


def test_stop_token_ids(scripted, tokenizer):
    llm, script = scripted
    tool, eos, end = tokenizer.convert_tokens_to_ids("<tool>"), tokenizer.eos_token_id, tokenizer.encode("end")[0]
    first_tool, first_end, first_eos = (script.index(token) + 1 for token in (tool, end, eos))
    outputs = _run(
        llm,
        {"stop_token_ids": [tool]},
        {"stop_token_ids": [tool, end]},
        {"stop_token_ids": [end], "include_stop_str_in_output": True},
        {"stop_token_ids": [eos], "ignore_eos": True},
        {"stop_token_ids": [eos]},
    )
    assert [_ends(output) for output in outputs] == [
        ("stop", tool, script[:first_tool]),
        ("stop", end, script[:first_end]),
        ("stop", end, script[:first_end]),
        ("stop", eos, script[:first_eos]),
        ("stop", None, script[:first_eos]),
    ]
    assert outputs[0].text == tokenizer.decode(script[: first_tool - 1])
    assert outputs[1].text == tokenizer.decode(script[: first_end - 1])
    assert outputs[2].text == tokenizer.decode(script[:first_end])


def test_min_tokens(scripted, tokenizer):
    """A banned stop token gives way to the next likeliest; the row may end on the token after min_tokens."""
    llm, script = scripted
    tool = tokenizer.convert_tokens_to_ids("<tool>")
    at = script.index(tool)
    just, over = _run(
        llm, {"min_tokens": at, "stop_token_ids": [tool]}, {"min_tokens": at + 1, "stop_token_ids": [tool]}
    )
    assert _ends(just) == ("stop", tool, script[: at + 1])
    assert over.token_ids[:at] == script[:at]
    assert over.token_ids[at] != tool
    assert over.token_ids[at + 1 : at + 9] == script[at + 1 : at + 9]
    eos = script.index(tokenizer.eos_token_id)
    output, ignored = _run(llm, {"min_tokens": eos + 1}, {"min_tokens": eos + 1, "ignore_eos": True})
    assert tokenizer.eos_token_id not in output.token_ids[: eos + 1]
    assert output.finish_reason == "stop"
    assert ignored.token_ids[: eos + 2] == output.token_ids[: eos + 2]  # banned too, as in vLLM
    assert tokenizer.eos_token_id in ignored.token_ids[eos + 1 :]  # but ends nothing
    assert ignored.finish_reason == "length"


STOPS = [
    ("the end",), ("🙂",), ("e",), ("ï",), ("ve 🙂🙂 t",), ("語",), ("語 the the",), ("\n\n",), ("\n\nfin",),
    ("nothing", "本", "日本語"), ("end", "d, 日"), ("absent",), ("the", "the end"), ("n",),
]  # fmt: skip


def naive(tokenizer, ids: list[int], params: SamplingParams) -> tuple[int, str, str] | None:
    """Decode everything after every token: (number of tokens, stop string, text), or None if none is met.

    What the first min_tokens tokens say does not count.
    """
    free = tokenizer.decode(ids[: params.min_tokens], skip_special_tokens=params.skip_special_tokens)
    num_free = len(free.rstrip("\ufffd")) if params.min_tokens else 0
    for num in range(params.min_tokens + 1, len(ids) + 1):
        text = tokenizer.decode(ids[:num], skip_special_tokens=params.skip_special_tokens)
        found = [
            (at, stop)
            for stop in params.stop
            for at in range(len(text))
            if text.startswith(stop, at) and at + len(stop) > num_free
        ]
        if found:
            at, stop = min(found)
            return num, stop, text[: at + len(stop) * params.include_stop_str_in_output]
    return None


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings(scripted, tokenizer, include):
    llm, script = scripted
    end = script.index(tokenizer.eos_token_id) + 1
    every = [{"stop": stop, "include_stop_str_in_output": include} for stop in STOPS]
    outputs = _run(llm, *every)
    assert sum(output.stop_reason is not None for output in outputs) >= len(STOPS) - 1
    for params, output in zip(every, outputs, strict=True):
        want = naive(tokenizer, script[:end], SamplingParams(**params))
        if want is None:
            assert _ends(output) == ("stop", None, script[:end])
        else:
            assert _ends(output) == ("stop", want[1], script[: want[0]])
            assert output.text == want[2]


def test_stop_strings_end_where_transformers_ends(scripted, tokenizer):
    """transformers' StopStringCriteria, on the same model."""
    llm, _ = scripted
    model = GPT2LMHeadModel.from_pretrained(llm.config.model)
    ids = torch.tensor([[5]])
    for stop in [("the end",), ("end", "d, "), ("naïve",), ("\n\nfin",), (" the the",), ("absent", " the t")]:
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=60, stop_strings=list(stop),
            tokenizer=tokenizer, pad_token_id=0,
        )  # fmt: skip
        assert out[0, 1:].tolist() == _run(llm, {"stop": stop})[0].token_ids


def test_stop_string_after_min_tokens(scripted, tokenizer):
    """The first "the end" lies within min_tokens; the second ends the row, and the text keeps the first."""
    llm, script = scripted
    second = SCRIPT.replace("<tool>", "").index("the end", SCRIPT.index("end"))
    output = _run(llm, {"stop": "the end", "min_tokens": 25})[0]
    assert (output.finish_reason, output.stop_reason) == ("stop", "the end")
    assert output.text == SCRIPT.replace("<tool>", "")[:second]
    assert output.token_ids == script[: len(output.token_ids)]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_stop_strings_of_any_text(tokenizer, data):
    """Token by token over random ids, against decoding everything each time."""
    common = tokenizer.encode("the end 🙂 é日\n\n") + [2]
    ids = data.draw(st.lists(st.sampled_from(common) | st.integers(0, len(tokenizer) - 1), min_size=1, max_size=60))
    text = tokenizer.decode(ids, skip_special_tokens=True).replace("\ufffd", "") + "?"
    starts = data.draw(st.lists(st.integers(0, len(text) - 1), min_size=1, max_size=3))
    stops = [text[at : at + data.draw(st.integers(1, 6))] for at in starts]
    params = SamplingParams(
        stop=stops,
        max_tokens=100,
        min_tokens=data.draw(st.sampled_from([0, 0, 1, 5, 20])),
        include_stop_str_in_output=data.draw(st.booleans()),
        skip_special_tokens=data.draw(st.booleans()),
    )
    request, got = Request("0", [5], params), None
    for token in ids:
        request.output_token_ids.append(token)
        if len(request.output_token_ids) <= params.min_tokens:
            continue
        request.stop_reason = find_stop_string(tokenizer, request)
        if request.stop_reason is not None:
            got = len(request.output_token_ids), request.stop_reason, final_text(tokenizer, request)
            break
    assert got == naive(tokenizer, ids, params)
