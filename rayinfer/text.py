"""Text of generated tokens, and stop strings."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from rayinfer.request import Request


def final_text(tokenizer: PreTrainedTokenizerBase, request: Request) -> str:
    """`tokenizer.decode` of the generated ids, less an ending stop token or (unless asked for) stop string."""
    ids, params = request.output_token_ids, request.params
    if isinstance(request.stop_reason, int) and not params.include_stop_str_in_output:
        ids = ids[:-1]
    text = _decode(tokenizer, ids, request)
    if isinstance(request.stop_reason, str):
        end = text.find(request.stop_reason)
        text = text[: end + len(request.stop_reason) * params.include_stop_str_in_output]
    return text


def find_stop_string(tokenizer: PreTrainedTokenizerBase, request: Request) -> str | None:
    """The stop string that the newest token completed, if any; of several, the one that begins first.

    Only the tail is decoded for each token: a token of a stop string adds at least one byte, so as many tokens as
    the longest string has bytes, and a few for what a tail decodes differently at its start. A hit is confirmed on the
    whole text.
    """
    stops = request.params.stop
    tail = max(len(stop.encode()) for stop in stops) + 8
    ids = request.output_token_ids
    window = _decode(tokenizer, ids[-tail:], request)
    if len(ids) > tail and not any(stop in window for stop in stops):
        return None
    text = _decode(tokenizer, ids, request) if len(ids) > tail else window
    found = [(text.find(stop), stop) for stop in stops if stop in text]
    return min(found)[1] if found else None


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int], request: Request) -> str:
    return tokenizer.decode(ids, skip_special_tokens=request.params.skip_special_tokens)
