"""Attention backends behind one five-method contract, chosen apart for prefill and decode."""

from torch import device as Device

from rayinfer.attention.base import AttentionBackend, LayerCache, LayerSpec, StepMeta, StepOutputs
from rayinfer.attention.torch import TorchBackend

__all__ = ["AttentionBackend", "LayerCache", "LayerSpec", "StepMeta", "StepOutputs", "backend_name", "get_backend"]


def backend_name(name: str, device: Device) -> str:
    """`name`; "auto" is triton on a GPU and torch on a CPU."""
    return name if name != "auto" else "triton" if device.type == "cuda" else "torch"


def get_backend(name: str, device: Device, fixed_order: bool = False) -> AttentionBackend:
    """The backend called `name`; `fixed_order` makes triton's results independent of the batch.

    Raises:
        ConfigError: of another package's: it is not installed, or not for this device.
    """
    chosen = backend_name(name, device)
    if chosen == "triton":
        from rayinfer.attention.triton import TritonBackend

        return TritonBackend(fixed_order)
    if chosen != "torch":
        from rayinfer.attention.packages import PACKAGES

        return PACKAGES[chosen](device)
    return TorchBackend()
