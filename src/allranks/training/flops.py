"""How much a model computes: floating-point operations of an example, and what the device could do at most.

They are counted once, in the trial before a training (trial.py) or by run.count_flops() in a loop of the
user's own, from the shapes of the matrix products, convolutions and attentions of a forward and a backward
pass. All else in a model is small beside these. The counts are those of torch.utils.flop_counter, which
costs an import of 0.7 s and is not used here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from allranks.runtime.runtime import Runtime

# --- counting ------------------------------------------------------------------------------------------

Result = TypeVar("Result")

# Operators that compute much, and whose work does not follow from the shapes of their arguments, or which
# nobody has counted here.
_UNKNOWN = {
    "_cudnn_rnn", "miopen_rnn", "mkldnn_rnn_layer", "_lstm_mps", "_thnn_fused_lstm_cell", "_trilinear",
    "_scaled_dot_product_attention_math_for_mps", "_scaled_dot_product_fused_attention_overrideable",
}  # fmt: skip


class Flops(TorchDispatchMode):
    """Counts the floating-point operations of what runs in its `with` block, backward passes included.

    `count` is None where an operator ran whose work is not known.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count: int | None = 0
        self.has_convolutions = False  # whether some of the operations were convolutions

    def during(self, compute: Callable[[], Result]) -> Result:
        """What `compute` returns, its operations counted.

        torch's higher-order operators, such as torch.cond and flex_attention, do not run while operations
        are counted. If `compute` needs one, it is called once more without counting.
        """
        if self.count is not None:
            try:
                with self:
                    return compute()
            except NotImplementedError:
                self.count = None
        return compute()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        name = operator.overloadpacket.__name__
        if name in _UNKNOWN:
            self.count = None
        if name in _CONVOLUTIONS:
            self.has_convolutions = True
        counted = _COUNTED.get(name)
        if counted is not None and self.count is not None:
            self.count += counted(args, result)
        return result


def _product(a: torch.Tensor, b: torch.Tensor) -> int:
    """The product a @ b: a multiplication and an addition for each number of `a` and each column of `b`."""
    return 2 * a.numel() * b.shape[-1]


def _convolution(args: Sequence[Any], result: torch.Tensor) -> int:
    images, weights = args[0], args[1]
    is_transposed = args[6]
    places = images if is_transposed else result  # each weight is used once at each of these places
    return 2 * places.shape[0] * prod(places.shape[2:]) * weights.numel()


def _convolution_backward(args: Sequence[Any], _: Any) -> int:
    gradient, images, weights = args[0], args[1], args[2]
    is_transposed = args[7]
    wanted = args[10]  # the gradients of images, weights and bias
    places = images if is_transposed else gradient
    once = 2 * places.shape[0] * prod(places.shape[2:]) * weights.numel()
    return once * (bool(wanted[0]) + bool(wanted[1]))


def _attention(args: Sequence[Any], _: Any) -> int:
    """Two products: queries by keys, and the result by values; each is [batch, heads, length, features]."""
    queries, keys, values = args[:3]
    return 2 * prod(queries.shape[:3]) * keys.shape[2] * (queries.shape[3] + values.shape[3])


def _attention_backward(args: Sequence[Any], _: Any) -> int:
    """Five products: the scores once more, and the gradients of scores, values, queries and keys."""
    _gradient, queries, keys, values = args[:4]
    features = 3 * queries.shape[3] + 2 * values.shape[3]
    return 2 * prod(queries.shape[:3]) * keys.shape[2] * features


_CONVOLUTIONS = ("convolution", "_convolution")
_COUNTED: dict[str, Callable[[Sequence[Any], Any], int]] = {
    "mm": lambda args, _: _product(args[0], args[1]),
    "bmm": lambda args, _: _product(args[0], args[1]),
    "addmm": lambda args, _: _product(args[1], args[2]),
    "baddbmm": lambda args, _: _product(args[1], args[2]),
    "convolution": _convolution,
    "_convolution": _convolution,
    "convolution_backward": _convolution_backward,
    **{
        f"_scaled_dot_product_{kind}": counted
        for kind, counted in {
            "flash_attention": _attention,
            "flash_attention_for_cpu": _attention,
            "efficient_attention": _attention,
            "cudnn_attention": _attention,
            "flash_attention_backward": _attention_backward,
            "flash_attention_for_cpu_backward": _attention_backward,
            "efficient_attention_backward": _attention_backward,
            "cudnn_attention_backward": _attention_backward,
        }.items()
    },
}


# --- what devices can do -------------------------------------------------------------------------------


class Peak(NamedTuple):
    """The most that one device can compute, in 10^12 floating-point operations per second.

    The numbers are for products of dense matrices, on the device's matrix units where these support the
    type. `tf32` is a shortened form of fp32: PyTorch computes products of fp32 numbers in it where the
    user allows that.
    """

    fp64: float
    fp32: float
    tf32: float
    bf16: float
    fp16: float


# The key is a part of the name that torch gives the device; the first key that occurs in the name counts.
# Vendors often state the rate for sparse matrices, which is twice the rate here.
PEAKS = {
    # NVIDIA H200 datasheet; the chip is that of H100 SXM.
    "H200": Peak(fp64=67, fp32=67, tf32=494.7, bf16=989.4, fp16=989.4),
    # NVIDIA H100 Tensor Core GPU architecture, table 2: H100 PCIe, then H100 SXM5.
    "H100 PCIe": Peak(fp64=51.2, fp32=51.2, tf32=378, bf16=756, fp16=756),
    "H100": Peak(fp64=66.9, fp32=66.9, tf32=494.7, bf16=989.4, fp16=989.4),
    # NVIDIA A100 Tensor Core GPU architecture, table 1; SXM and PCIe alike.
    "A100": Peak(fp64=19.5, fp32=19.5, tf32=156, bf16=312, fp16=312),
    # AMD Instinct MI250X data sheet, halved: torch's device is one of its two dies (a GCD). It has no TF32.
    "MI250X": Peak(fp64=47.9, fp32=47.9, tf32=47.9, bf16=191.5, fp16=191.5),
    # Intel Data Center GPU Max 1550 product brief, halved: torch's device is one of its two tiles by
    # default (ZE_FLAT_DEVICE_HIERARCHY=FLAT).
    "GPU Max 1550": Peak(fp64=26, fp32=26, tf32=209.5, bf16=419.5, fp16=419.5),
}


def peak_flops_per_s(device_name: str, precision: str, allows_tf32: bool) -> float | None:
    """What one device of this name can compute in this trainer.precision; None if that is not known."""
    for part, peak in PEAKS.items():
        if part in device_name:
            kind = "tf32" if precision == "fp32" and allows_tf32 else precision
            return 1e12 * getattr(peak, kind)
    return None


def peak_of_this_device(runtime: Runtime, precision: str, has_convolutions: bool) -> float | None:
    """What this rank's device can compute per second; None if that is not known, as for a CPU."""
    kind = runtime.device.type
    if kind not in ("cuda", "xpu"):
        return None
    name = getattr(torch, kind).get_device_name(runtime.device)
    try:
        # By default PyTorch computes convolutions of fp32 numbers in TF32 on NVIDIA's GPUs, but no
        # products.
        allows_tf32 = torch.get_float32_matmul_precision() != "highest"
        if kind == "cuda" and has_convolutions:
            allows_tf32 = allows_tf32 or torch.backends.cudnn.allow_tf32
    except RuntimeError:  # where the user has set TF32 by torch's newer names, these two cannot be asked
        return None
    return peak_flops_per_s(name, precision, allows_tf32)
