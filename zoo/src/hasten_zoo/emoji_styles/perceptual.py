"""A learned perceptual distance that can be descended: LPIPS on a shift-tolerant AlexNet.

The weights are those of the package `stlpips-pytorch`; its code is not imported, since that wants torchvision. The
distance follows LPIPS (Zhang et al., 2018): activations of five layers, scaled to unit length over the channels,
squared differences weighted per channel, averaged over positions, summed over layers. Stride 1 in the first
convolution and a binomial blur before every later stride make the network shift-tolerant (Ghildyal and Liu, 2022).

Shapes: images `[B, 3, H, W]` in [-1, 1], from 64 pixels up.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Perceptual"]

WEIGHTS = ("weights", "vST0.0", "alex_shift_tolerant.pth")
CONVOLUTIONS = ("net.slice1.0", "net.slice2.5", "net.slice3.9", "net.slice4.11", "net.slice5.13")
BLURS = ("net.slice1.1", "net.slice2.4", "net.slice3.8")


class Perceptual(nn.Module):
    """The network and its heads, frozen.

    Raises:
        FileNotFoundError: if the package with the weights is not installed.
    """

    def __init__(self) -> None:
        super().__init__()
        spec = importlib.util.find_spec("stlpips_pytorch")  # finds the package without running it
        folders = (spec.submodule_search_locations or []) if spec is not None else []
        path = next((p for p in (Path(folder, *WEIGHTS) for folder in folders) if p.is_file()), None)
        if path is None:
            raise FileNotFoundError("the LPIPS weights are not installed; pip install stlpips-pytorch==0.0.2")
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        self.shift, self.scale = nn.Buffer(state["scaling_layer.shift"]), nn.Buffer(state["scaling_layer.scale"])
        for i, name in enumerate(CONVOLUTIONS):
            self.register_buffer(f"weight{i}", state[f"{name}.weight"])
            self.register_buffer(f"bias{i}", state[f"{name}.bias"])
            self.register_buffer(f"head{i}", state[f"lin{i}.model.1.weight"])
        for i, name in enumerate(BLURS):
            self.register_buffer(f"blur{i}", state[f"{name}.filt"])

    def features(self, images: Tensor) -> list[Tensor]:
        """The five activations, each scaled to unit length over the channels, float32."""
        x = self._convolution((images - self.shift) / self.scale, 0, padding=2)
        taps = [F.relu(self._blurred(x, 0))]
        for i in (1, 2):
            x = self._blurred(F.max_pool2d(taps[-1], kernel_size=3, stride=1), i)
            taps.append(F.relu(self._convolution(x, i, padding=3 - i)))
        for i in (3, 4):
            taps.append(F.relu(self._convolution(taps[-1], i, padding=1)))
        return [F.normalize(tap.float(), dim=1, eps=1e-6) for tap in taps]

    def distance(self, first: list[Tensor], second: list[Tensor]) -> Tensor:
        """`[B]` distances between the features of two batches; a batch of one is compared with all of the other."""
        total = torch.zeros((), device=first[0].device)
        for i, (a, b) in enumerate(zip(first, second, strict=True)):
            head: Tensor = getattr(self, f"head{i}")
            total = total + ((a - b).square() * head).sum(1).mean((1, 2))
        return total

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """`[B]` distances between two batches of images."""
        return self.distance(self.features(first), self.features(second))

    def _convolution(self, x: Tensor, layer: int, padding: int) -> Tensor:
        weight, bias = getattr(self, f"weight{layer}"), getattr(self, f"bias{layer}")
        return F.conv2d(x, weight, bias, padding=padding)

    def _blurred(self, x: Tensor, layer: int) -> Tensor:
        """Depthwise 3x3 blur at stride 2; the reflected margin of 2 is the one the weights were trained with."""
        kernel: Tensor = getattr(self, f"blur{layer}")
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=x.shape[1])
