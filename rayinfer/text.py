"""Text of generated tokens, and stop strings."""

from transformers import PreTrainedTokenizerBase

from rayinfer.request import Request


def final_text(tokenizer: PreTrainedTokenizerBase, request: Request) -> str:
    """`tokenizer.decode` of the generated ids, less (unless asked for) the EOS or stop that ended it."""
    ids, params, stop = request.output_token_ids, request.params, request.stop_reason
    if isinstance(stop, str):
        text = _decode(tokenizer, ids, request)
        return text[: _find(text, stop, tokenizer, request) + len(stop) * params.include_stop_str_in_output]
    if request.finish_reason == "stop" and not params.include_stop_str_in_output:
        ids = ids[:-1]
    return _decode(tokenizer, ids, request)


def find_stop_string(tokenizer: PreTrainedTokenizerBase, request: Request) -> str | None:
    """The stop string that the newest token completed, if any; of several, the one that begins first.

    One that ends within the first min_tokens tokens does not count.

    Only the tail is decoded for each token: a token of a stop string adds at least one byte, so as many tokens as
    the longest string has bytes, and a few for what a tail decodes differently at its start. A hit is confirmed on the
    whole text.
    """
    stops = request.params.stop
    tail = max(len(stop.encode()) for stop in stops) + 8
    ids = request.output_token_ids
    text = _decode(tokenizer, ids[-tail:], request)
    if len(ids) > tail and any(stop in text for stop in stops):
        text = _decode(tokenizer, ids, request)
    found = [(at, stop) for stop in stops if (at := _find(text, stop, tokenizer, request)) >= 0]
    return min(found)[1] if found else None


def _find(text: str, stop: str, tokenizer: PreTrainedTokenizerBase, request: Request) -> int:
    """Where the first stop string that counts begins in the text, or -1."""
    if stop not in text or not request.params.min_tokens:
        return text.find(stop)
    exempt = _decode(tokenizer, request.output_token_ids[: request.params.min_tokens], request)
    return text.find(stop, max(0, len(exempt.rstrip("\ufffd")) - len(stop) + 1))  # a cut character is yet to come


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int], request: Request) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=request.params.skip_special_tokens))
