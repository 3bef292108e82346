"""A linear layer is (weights, method): how it is computed is chosen at load, not by subclassing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

# How a `Linear` is computed, of (layer, x [T, I], onto [T, O] or None): returns [T, O]; for x of [1, T, I] (the output
# layer's), [1, T, O]. Or adds it to `onto`, in place. Unquantized here; FP8, W4A16 and LoRA are other methods.
LinearMethod = Callable[["Linear", torch.Tensor, torch.Tensor | None], torch.Tensor]


def unquantized(layer: Linear, x_TI: torch.Tensor, onto_TO: torch.Tensor | None) -> torch.Tensor:
    """y = x W^T + b in the weights' dtype."""
    if onto_TO is None:
        return F.linear(x_TI, layer.weight, layer.bias)
    if x_TI.is_cuda and layer.bias is None:  # the product reads and writes `onto` itself: two passes fewer
        return onto_TO.addmm_(x_TI, layer.weight.t())
    return onto_TO.add_(F.linear(x_TI, layer.weight, layer.bias))


def fixed_order(layer: Linear, x_TI: torch.Tensor, onto_TO: torch.Tensor | None) -> torch.Tensor:
    """The same by a kernel that sums in one order: a row's result does not depend on the batch that it is in."""
    from rayinfer.kernels.matmul import matmul

    out_TO = matmul(x_TI.flatten(0, -2), layer.weight, layer.bias).unflatten(0, x_TI.shape[:-1])
    return out_TO if onto_TO is None else onto_TO.add_(out_TO)


class Linear(nn.Module):
    """Weights [O, I] and an optional bias [O]; the method computes. Inference only."""

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None):
        super().__init__()
        self.weight = nn.Parameter(weight_OI, requires_grad=False)
        self.bias = None if bias_O is None else nn.Parameter(bias_O, requires_grad=False)
        self.method: LinearMethod = unquantized

    @classmethod
    def merge(cls, parts: Sequence[nn.Linear]) -> Linear:
        """One layer whose output is the parts' outputs side by side. The parts' weights are freed."""
        biases = [part.bias for part in parts]
        assert all((bias is None) == (biases[0] is None) for bias in biases), "some parts have a bias, some not"
        with torch.no_grad():
            weight = torch.cat([part.weight for part in parts]) if len(parts) > 1 else parts[0].weight.data
            bias = None if biases[0] is None else torch.cat([bias for bias in biases if bias is not None])
        for part in parts:
            part.weight = part.bias = None  # type: ignore[assignment]
        return cls(weight, bias)

    def forward(self, x_TI: torch.Tensor, onto_TO: torch.Tensor | None = None) -> torch.Tensor:
        return self.method(self, x_TI, onto_TO)
