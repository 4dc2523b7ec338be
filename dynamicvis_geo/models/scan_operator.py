"""The scan and the convolution as operators of PyTorch, ``dynamicvis_geo::...``.

Each is defined once, with the PyTorch form as what runs anywhere. ``scan_c.py`` adds a
kernel for CPUs and ``scan_triton.py`` one for CUDA, and PyTorch's dispatcher chooses by
the device of the tensors. A program that ``torch.export`` saved needs the module of its
device imported where it runs.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dynamicvis_geo.models import scan


@torch.library.custom_op('dynamicvis_geo::selective_scan', mutates_args=())
def scan_operator(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    gate: Tensor,
) -> Tensor:
    """Run the scan without gradients, by the kernel of the device."""
    return scan.selective_scan(u, dt, A, B, C, D, dt_bias, gate)


@torch.library.custom_op('dynamicvis_geo::causal_conv', mutates_args=())
def conv_operator(
    x: Tensor, weight: Tensor, bias: Tensor | None, directions: int
) -> Tensor:
    """Run the convolution without gradients, by the kernel of the device."""
    return scan.causal_conv(x, weight, bias, directions)


@scan_operator.register_fake
def _(u: Tensor, *_: Tensor) -> Tensor:
    return u.new_empty(u.shape)


@conv_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, directions: int) -> Tensor:
    return x.new_empty((directions, *x.shape))


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    gate: Tensor,
    *,
    kernel: Callable[..., Tensor] = scan_operator,
) -> Tensor:
    """Run the recurrence of :func:`dynamicvis_geo.models.scan.selective_scan`.

    float64 tensors, and tensors that need gradients, take the PyTorch form.
    """
    tensors = u, dt, A, B, C, D, dt_bias, gate
    if u.dtype == torch.float64 or scan.needs_gradients(tensors):
        return scan.selective_scan(*tensors)
    return kernel(*tensors)


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    directions: int,
    *,
    kernel: Callable[..., Tensor] = conv_operator,
) -> Tensor:
    """Run the convolution of :func:`dynamicvis_geo.models.scan.causal_conv`.

    float64 tensors, and tensors that need gradients, take the PyTorch form.
    """
    if x.dtype == torch.float64 or scan.needs_gradients((x, weight, bias)):
        return scan.causal_conv(x, weight, bias, directions)
    return kernel(x, weight, bias, directions)
