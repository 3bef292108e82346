"""Ray Data processors. Importing this needs Ray; torch and transformers are loaded when a dataset is processed."""

from rayinfer.processors.config import EngineProcessorConfig
from rayinfer.processors.llm_processor import LLMProcessor
from rayinfer.processors.processor import Processor, build_processor
from rayinfer.processors.stats import StatsBoard

__all__ = ["EngineProcessorConfig", "LLMProcessor", "Processor", "StatsBoard", "build_processor"]
