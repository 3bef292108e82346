"""From a row to token ids: chat template, tokenizer, limits. Needs no weights, so it runs on any CPU."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from rayinfer.chat import START, ChatTemplate, encode_marked, unmarked
from rayinfer.config import EngineConfig
from rayinfer.errors import ConfigError, ErrorType, RowError, describe
from rayinfer.request import EncodedRow
from rayinfer.sampling import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rayinfer.models.model import ModelInfo

INPUT_KEYS = ("messages", "prompt", "prompt_token_ids")


class InputProcessor:
    """Turns rows into EncodedRows; a row that cannot be turned costs only itself.

    Pickled, it takes its tokenizer along: to make one anew takes seconds, most of them to import torch and what reads
    models. Tokenizers of other code than transformers', and those that are not fast, are made anew.

    Args:
        config: the engine's; its max_model_len (or the model's own) bounds prompts.
        chat_template: instead of the tokenizer's own. chat_template_kwargs: passed to it.
        info: what `inspect_model` says, if it was asked before.

    Raises:
        ConfigError: the model folder or tokenizer cannot be used.
    """

    def __init__(
        self, config: EngineConfig, chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None, info: ModelInfo | None = None,
    ):  # fmt: skip
        if info is None:
            from rayinfer.models.load import inspect_model  # it imports what runs models: 2 s

            info = inspect_model(config)
        self.max_model_len, self._vocab_size, self._config = info.max_model_len, info.vocab_size, config
        _ = self.tokenizer  # made now, for what it raises
        self._chat_args = chat_template, dict(chat_template_kwargs or {})

    def with_template(self, chat_template: str | None, chat_template_kwargs: Mapping[str, Any] | None) -> Self:
        """The same tokenizer and limits with another chat template."""
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__ | {"_chat_args": (chat_template, dict(chat_template_kwargs or {}))}
        other.__dict__.pop("_chat", None)
        return other

    def __getstate__(self) -> dict[str, Any]:
        tokenizer, left_out = self.tokenizer, ["_chat"]  # a compiled template does not pickle
        if tokenizer is not None and not (tokenizer.is_fast and type(tokenizer).__module__.startswith("transformers.")):
            left_out.append("tokenizer")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's; None with skip_tokenizer_init. Raises ConfigError: there is none where the config points."""
        config, extra = self._config, dict[str, Any]()
        if config.skip_tokenizer_init:
            return None
        from transformers import AutoTokenizer  # with torch

        source = config.tokenizer or config.model
        if source.endswith(".gguf"):
            source, extra = str(Path(source).parent), {"gguf_file": Path(source).name}
        try:
            extra |= {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
            return AutoTokenizer.from_pretrained(source, **extra)
        except (OSError, ValueError, KeyError) as error:
            place = f"tokenizer = {config.tokenizer or config.model!r}"
            hint = "give `tokenizer`, or skip_tokenizer_init=True if rows bring prompt_token_ids"
            raise ConfigError(f"{place}: cannot be loaded ({error}); {hint}") from error

    @cached_property
    def _chat(self) -> ChatTemplate:
        assert self.tokenizer is not None
        return ChatTemplate(self.tokenizer, *self._chat_args)

    def encode_batch(self, rows: Sequence[Mapping[str, Any]]) -> list[EncodedRow | RowError]:
        """Encode rows, tokenizing all texts in one call. The results are in the order of the rows.

        A row has exactly one of `messages`, `prompt`, `prompt_token_ids` that is not None, and may have
        `sampling_params`.
        """
        results: list[EncodedRow | RowError | None] = [None] * len(rows)
        texts = defaultdict[bool, list[tuple[int, str, SamplingParams]]](list)  # by whether special tokens are added
        for index, row in enumerate(rows):
            try:
                params = SamplingParams.from_row(_plain(row.get("sampling_params")))
                kind, value = self._input_of(row)
                if kind == "prompt_token_ids":
                    results[index] = self._checked(value, params, None)
                else:
                    text = self._text(value) if kind == "prompt" else self._render(value)
                    marked = getattr(value, "marked", None) if kind == "prompt" else text if START in text else None
                    if marked is not None and self.tokenizer is not None:
                        apart = encode_marked(self.tokenizer, marked, add_special_tokens=kind == "prompt")
                        results[index] = self._checked(apart, params, unmarked(text))
                    else:
                        texts[kind == "prompt"].append((index, text, params))
            except RowError as error:
                results[index] = error
            except Exception as error:  # values nested too deeply, a mapping that is none
                results[index] = _bad(f"the row's input: {describe(error, row)}")
        for add_special_tokens, entries in texts.items():
            ids_of = self._tokenize([text for _, text, _ in entries], add_special_tokens)
            for (index, text, params), ids in zip(entries, ids_of, strict=True):
                try:
                    results[index] = ids if isinstance(ids, RowError) else self._checked(ids, params, text)
                except RowError as error:
                    results[index] = error
        return [result for result in results if result is not None]

    def _input_of(self, row: Mapping[str, Any]) -> tuple[str, Any]:
        given = [key for key in INPUT_KEYS if row.get(key) is not None]
        if len(given) != 1:
            state = "all None or missing" if not given else f"{' and '.join(given)} are both set"
            raise _bad(f"a row needs one of {', '.join(INPUT_KEYS)}: {state}")
        if given[0] != "prompt_token_ids" and self.tokenizer is None:
            raise _bad(f"{given[0]}: no tokenizer (skip_tokenizer_init); give prompt_token_ids")
        return given[0], row[given[0]]

    def _text(self, value: Any) -> str:
        if not isinstance(value, str):
            raise _bad(f"prompt: want a string, got {type(value).__name__}")
        if not value:
            raise _bad("prompt: is empty")
        return value

    def _render(self, value: Any) -> str:
        """Chat template over checked messages."""
        messages = _plain(value)
        if not isinstance(messages, list) or not messages:
            raise _bad("messages: want a list of {role, content} that is not empty")
        for number, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise _bad(f"messages[{number}]: want a mapping with a string `role`")
            content = message.get("content", [] if message.get("tool_calls") else None)
            if isinstance(content, list):  # OpenAI-style parts
                texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
                if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
                    raise _bad(f"messages[{number}].content: only parts of type text are supported")
                content = message["content"] = "".join(part["text"] for part in content)
            if not isinstance(content, str):
                raise _bad(f"messages[{number}].content: want a string, got {type(content).__name__}")
        try:
            return self._text(self._chat.render(messages))
        except RowError:
            raise
        except Exception as error:  # templates raise whatever they like
            raise RowError(ErrorType.TEMPLATE_ERROR, f"chat template: {describe(error, messages)}") from None

    def _tokenize(self, texts: list[str], special: bool) -> Sequence[list[int] | RowError]:
        assert self.tokenizer is not None
        try:
            return self.tokenizer(texts, add_special_tokens=special, return_attention_mask=False)["input_ids"]
        except Exception as error:  # for example a lone surrogate, which no UTF-8 tokenizer takes
            if len(texts) == 1:
                return [_bad(f"the tokenizer refused the text: {type(error).__name__}")]
        return [self._tokenize([text], special)[0] for text in texts]

    def _checked(self, ids: Any, params: SamplingParams, text: str | None) -> EncodedRow:
        """Check token ids: the tokenizer's, or what a row has as such, which comes without a text."""
        try:
            array = np.asarray(ids)
        except ValueError:  # ragged
            array = np.zeros((0, 0))
        if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
            want = "prompt_token_ids: want a list of integers that is not empty"
            raise _bad(want if text is None else "the prompt has no tokens")
        source = "prompt_token_ids" if text is None else "the text: the tokenizer has tokens that the model lacks"
        self._check_ids((array.min(), array.max()), ErrorType.INVALID_TOKEN_IDS, source)
        check_length(len(array), self.max_model_len)
        self._check_ids(params.stop_token_ids, ErrorType.INVALID_SAMPLING_PARAMS, "sampling_params: stop_token_ids")
        # Where a copy is enough it takes a tenth of the time.
        return EncodedRow(ids.copy() if isinstance(ids, list) and type(ids[0]) is int else array.tolist(), params, text)

    def _check_ids(self, ids: Iterable[int], kind: ErrorType, source: str) -> None:
        for token in ids:
            if not 0 <= token < self._vocab_size:
                raise RowError(kind, f"{source}: {token} is out of the vocabulary, 0 to {self._vocab_size - 1}")


def _bad(message: str) -> RowError:
    return RowError(ErrorType.INVALID_PROMPT, message)


def check_length(num_tokens: int, max_model_len: int) -> None:
    """Raise RowError unless the prompt leaves room for one generated token."""
    if num_tokens >= max_model_len:
        fit = f"at most {max_model_len - 1} fit, with one to generate (max_model_len = {max_model_len})"
        raise RowError(ErrorType.PROMPT_TOO_LONG, f"the prompt has {num_tokens} tokens; {fit}")


def _plain(value: Any) -> Any:
    """Undo what Arrow and numpy make of nested values; struct fields that are None count as absent."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items() if inner is not None}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
