"""A bf16 model's matrix products by fp32 kernels: the values of its own kernels, which add in
fp32 and round once, but not in their order.

For machines whose bf16 kernels are the slow ones: on a Xeon with AVX-512 BF16 and without AMX
they do 84 GFLOP/s where fp32 ones do 160. What is traded is memory: each weight is held twice.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class _Product(torch.autograd.Function):
    """`x @ weight.T` and its gradient by x, `x` `[..., in]` bf16 and `weight` `[out, in]` fp32."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor) -> Tensor:
        ctx.weight = weight  # frozen: no output, nothing to check when it is read again
        return (x.float() @ weight.t()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (gradient,) = gradients
        return None, (gradient.float() @ ctx.weight).to(gradient.dtype)


def use_fp32_kernels(model: nn.Module) -> None:
    """Compute the model's linear layers this way from now on; their weights must be frozen."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.bias is None
            assert not module.weight.requires_grad
            module.forward = partial(_Product.apply, module.weight.detach().float())
