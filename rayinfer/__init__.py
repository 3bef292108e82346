"""rayinfer: run an LLM over a big table. See README.md for the five-line example, ARCHITECTURE.md for the rooms."""

from rayinfer.config import EngineConfig
from rayinfer.errors import ConfigError, ErrorType, RowError, UnsupportedModelError
from rayinfer.request import CompletionOutput, Logprob, RequestOutput
from rayinfer.sampling import SamplingParams

__version__ = "0.1.0"
__all__ = [
    "LLM", "CompletionOutput", "ConfigError", "EngineConfig", "ErrorType", "Logprob", "RequestOutput", "RowError",
    "SamplingParams", "UnsupportedModelError",
]  # fmt: skip


def __getattr__(name: str) -> object:
    """Load `LLM`, and torch and transformers with it, only when it is asked for."""
    if name == "LLM":
        from rayinfer.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
