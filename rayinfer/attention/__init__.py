"""Attention backends behind one five-method contract, chosen apart for prefill and decode."""

from __future__ import annotations

from torch import device as Device

from rayinfer.attention.base import AttentionBackend, LayerCache, LayerSpec, StepMeta, StepOutputs

__all__ = ["AttentionBackend", "LayerCache", "LayerSpec", "StepMeta", "StepOutputs", "get_backend"]


def get_backend(name: str, device: Device) -> AttentionBackend:
    """The backend called `name`; "auto" is triton on a GPU and torch on a CPU."""
    if name == "triton" or (name == "auto" and device.type == "cuda"):
        from rayinfer.attention.triton import TritonBackend

        return TritonBackend()
    from rayinfer.attention.torch import TorchBackend

    return TorchBackend()
