"""What ONNX Runtime's CPU provider computes in integers, found by looking at the graphs that it has optimised."""

from __future__ import annotations

import re
from pathlib import Path

from surgery import Target

ONNXRUNTIME_CPU = Target(
    name="onnxruntime-cpu",
    layers=frozenset({"Conv1d", "Conv2d", "Conv3d", "Linear"}),
    products=frozenset({"aten.matmul.default", "aten.bmm.default"}),
    joins=frozenset(
        {
            "aten.add.Tensor",
            "aten.mul.Tensor",
            "aten.cat.default",
            "aten.avg_pool2d.default",
            "aten.adaptive_avg_pool2d.default",
            "aten.sigmoid.default",
            "aten.hardsigmoid.default",  # as the sum that it is
            "aten.leaky_relu.default",
        }
    ),
    moves=frozenset(
        {
            "aten.view.default",
            "aten.reshape.default",
            "aten.flatten.using_ints",
            "aten.unflatten.int",
            "aten.squeeze.dim",
            "aten.squeeze.dims",
            "aten.unsqueeze.default",
            "aten.transpose.int",
            "aten.permute.default",
            "aten.slice.Tensor",
            "aten.select.int",
            "aten.pad.default",
            "aten.constant_pad_nd.default",
            "aten.max_pool1d.default",
            "aten.max_pool2d.default",
            "aten.chunk.default",
            "aten.split.Tensor",
            "aten.split_with_sizes.default",
            "aten.unbind.int",
            "aten.pixel_shuffle.default",
            "aten.pixel_unshuffle.default",
            "aten.channel_shuffle.default",
        }
    ),
    merged=frozenset(
        {
            "aten.relu.default",
            "aten.relu6.default",
            "aten.hardtanh.default",
            "aten.clamp.default",
            "aten.clamp_min.default",
        }
    ),
    float_outputs=frozenset({"Linear", "aten.matmul.default", "aten.bmm.default"}),
    saturates_without_vnni=True,
    least_group=8,  # int8 over float32: 0.2 with 1 channel read and 2 given, 0.5 to 0.7 with 4, 1.2 to 1.7 with 8
)

_CPUINFO = Path("/proc/cpuinfo")


def has_vnni() -> bool:
    """Whether this machine's processor adds products of 8 bits in 32; False where it does not tell."""
    try:
        text = _CPUINFO.read_text(errors="replace")
    except OSError:
        return False
    return re.search(r"\b(avx512_vnni|avx_vnni|asimddp)\b", text) is not None
