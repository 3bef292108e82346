"""Carries out step plans on one device."""

from rayinfer.runner.runner import Runner, StepHandle, StepResult

__all__ = ["Runner", "StepHandle", "StepResult"]
