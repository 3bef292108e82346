"""`LLM`: the engine for a script or a notebook, with vLLM's names."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from rayinfer.config import EngineConfig
from rayinfer.errors import ConfigError, ErrorType, RowError, choices
from rayinfer.request import EncodedRow, RequestOutput, failed_output
from rayinfer.sampling import SamplingParams
from rayinfer.start import start_engine

if TYPE_CHECKING:
    from rayinfer.inputs import InputProcessor

Prompt = str | Mapping[str, Any]
Params = SamplingParams | Sequence[SamplingParams] | None
_KEYS = ("prompt", "prompt_token_ids", "messages", "sampling_params")


class LLM:
    """A model on this process's device, answering lists of prompts.

    Args:
        model: local folder, hub id, or a single .gguf file. kwargs: the other fields of EngineConfig.

    Raises:
        ConfigError: a setting or the model cannot be used.
    """

    def __init__(self, model: str, **kwargs: Any):
        self.config = EngineConfig.parse(model=str(model), **kwargs)
        self.engine = start_engine(self.config)
        weakref.finalize(self, _free)
        self.engine.scheduler.all_known = True
        self._num_calls = 0

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None, *, use_tqdm: bool = True,
        on_error: str = "record",
    ) -> list[RequestOutput]:  # fmt: skip
        """Generate for each prompt; results are in the order of the prompts.

        Args:
            prompts: a string, a mapping with `prompt` or `prompt_token_ids`, or a sequence of these. A mapping with
                another key that is not None, such as `multi_modal_data`, is a failed prompt.
            sampling_params: one for all prompts, or one each.
            on_error: "record" gives a failed prompt an output with `error_type`; "raise" raises its RowError.
        """
        prompts = [prompts] if isinstance(prompts, str | Mapping) else prompts
        rows = [dict(p) if isinstance(p, Mapping) else {"prompt": p} for p in prompts]
        return self._run(rows, sampling_params, self.engine.inputs, use_tqdm, on_error)

    def chat(
        self, messages: Sequence[Any], sampling_params: Params = None, *, chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None, use_tqdm: bool = True, on_error: str = "record",
    ) -> list[RequestOutput]:  # fmt: skip
        """Generate for one conversation (a list of {role, content}) or for a list of them."""
        if isinstance(messages, str) or (messages and isinstance(messages[0], Mapping)):
            messages = [messages]
        inputs = self.engine.inputs.with_template(chat_template, chat_template_kwargs)
        return self._run([{"messages": m} for m in messages], sampling_params, inputs, use_tqdm, on_error)

    def get_tokenizer(self) -> Any:
        """The transformers tokenizer (None with skip_tokenizer_init)."""
        return self.engine.tokenizer

    def reset_prefix_cache(self) -> None:
        """Forget cached prefixes."""
        self.engine.pool.reset_prefix_cache()

    def _run(
        self, rows: list[dict[str, Any]], sampling_params: Params, inputs: InputProcessor, use_tqdm: bool, on_error: str
    ) -> list[RequestOutput]:
        if on_error not in ("record", "raise"):
            raise ConfigError(f"on_error = {on_error!r}: 'record' or 'raise'")
        params = sampling_params if isinstance(sampling_params, Sequence) else [sampling_params] * len(rows)
        if len(params) != len(rows):
            raise ConfigError(f"sampling_params has {len(params)} entries for {len(rows)} prompts")
        pairs = zip(rows, params, strict=True)
        rows = [{**r, "sampling_params": own if (it := r.get("sampling_params")) is None else it} for r, own in pairs]
        outputs: dict[int, RequestOutput] = {}
        self._num_calls += 1
        # Rows that may be long come first, so that few of them are left running alone at the end.
        encoded_rows = sorted(enumerate(inputs.encode_batch(rows)), key=lambda entry: -_most_tokens(entry[1]))
        for index, encoded in encoded_rows:
            request_id = f"{self._num_calls}-{index}"
            try:
                if unknown := [str(key) for key, it in rows[index].items() if key not in _KEYS and it is not None]:
                    text = f"unknown key {unknown[0][:60]!r}{choices(unknown[0], _KEYS, 'Allowed keys')}"
                    raise RowError(ErrorType.INVALID_PROMPT, text)
                if isinstance(encoded, RowError):
                    raise encoded
                self.engine.add(request_id, encoded)
            except RowError as error:
                if on_error == "raise":
                    self.engine.abort_all()
                    raise RowError(error.type, f"prompt {index}: {error}") from None
                outputs[index] = failed_output(encoded if isinstance(encoded, EncodedRow) else None, error, request_id)
                outputs[index].prompt = outputs[index].prompt or rows[index].get("prompt")
        with tqdm(total=len(rows), initial=len(outputs), disable=not use_tqdm, unit="row") as bar:
            try:
                while self.engine.has_work:
                    for output in self.engine.step():
                        index = int(output.request_id.rpartition("-")[2])
                        if output.error_type is not None and on_error == "raise":
                            raise RowError(ErrorType(output.error_type), f"prompt {index}: {output.error_message}")
                        outputs[index] = output
                        bar.update()
            except BaseException:  # Ctrl-C too: the engine must be usable for the next call
                self.engine.abort_all()
                raise
        return [outputs[index] for index in sorted(outputs)]


def _free() -> None:
    """Give back the memory of an LLM that nothing refers to any more: the start froze it, and its parts are cycles."""
    gc.unfreeze()
    gc.collect()


def _most_tokens(row: EncodedRow | RowError) -> int:
    """Tokens that a row may generate; rows without a limit of their own count as the longest."""
    return 0 if isinstance(row, RowError) else row.params.max_tokens or 2**31
