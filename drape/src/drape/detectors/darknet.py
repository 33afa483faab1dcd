"""Darknet networks (YOLOv3 family): a reader of `.cfg` and `.weights`, and the boxes of its heads.

Redmon and Farhadi, "YOLOv3: An Incremental Improvement", arXiv:1804.02767. At cell (i, j) of a head with stride s:

    centre = (sigmoid(t_xy) + (j, i)) s,    size = anchor * exp(t_wh),    score = sigmoid(t_object) * sigmoid(t_person)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from drape.detectors.base import Candidates, Detector
from drape.errors import DetectorError

__all__ = ["Darknet", "parse_cfg"]

Section = dict[str, str]
PERSON = 0
LARGEST = 4.0  # exponent that sizes are clamped to, against overflow
HEADER = 5  # int32 values before the weights


def parse_cfg(text: str) -> list[Section]:
    """The sections of a `.cfg` file in order, with their kind under the key "type"."""
    sections: list[Section] = []
    for raw in text.splitlines():
        line = raw.split("#")[0].strip()
        if line.startswith("["):
            sections.append({"type": line.strip("[]")})
        elif line and sections:
            key, _, value = line.partition("=")
            sections[-1][key.strip()] = value.strip()
    if not sections or sections[0]["type"] not in ("net", "network"):
        raise DetectorError("the file does not begin with a [net] section; expected a darknet .cfg file.")
    return sections


def numbers(value: str) -> list[int]:
    """Comma-separated whole numbers."""
    return [int(float(part)) for part in value.split(",")]


def convolution(section: Section, channels: int) -> nn.Sequential:
    """Convolution, batch norm if it has one, and activation."""
    size, normalised = int(section["size"]), section.get("batch_normalize", "0") == "1"
    padding = size // 2 if section.get("pad", "0") == "1" else 0
    filters = int(section["filters"])
    layers: list[nn.Module] = [nn.Conv2d(channels, filters, size, int(section["stride"]), padding, bias=not normalised)]
    if normalised:
        layers.append(nn.BatchNorm2d(filters, eps=1e-5))
    activation = section.get("activation", "linear")
    if activation == "leaky":
        layers.append(nn.LeakyReLU(0.1))
    elif activation != "linear":
        raise DetectorError(f"activation {activation!r} is not known; expected leaky or linear.")
    return nn.Sequential(*layers)


def pooling(section: Section) -> nn.Module:
    """Max pooling that halves, or that keeps the size: beyond the right and the bottom edge nothing is counted."""
    if int(section["stride"]) == 1:
        return nn.Sequential(nn.ReplicationPad2d((0, 1, 0, 1)), nn.MaxPool2d(int(section["size"]), 1))
    return nn.MaxPool2d(int(section["size"]), int(section["stride"]))


class Darknet(Detector):
    """A darknet network of convolutions, poolings, routes, upsamplings and YOLO heads.

    Args:
        cfg, weights: the two files.  name: what reports call it.
        input_size: a multiple of 32; the file's own if not given.

    Raises:
        DetectorError: a layer is of another kind, or the weights do not fit.
    """

    def __init__(self, cfg: Path, weights: Path, name: str = "yolov3-tiny", input_size: int | None = None) -> None:
        sections = parse_cfg(cfg.read_text())
        super().__init__(name, int(sections[0]["width"]) if input_size is None else input_size)
        self.sections = sections[1:]
        self.layers = nn.ModuleList()
        widths: list[int] = []
        channels = 3
        for number, section in enumerate(self.sections):
            layer: nn.Module = nn.Identity()
            kind = section["type"]
            if kind == "convolutional":
                layer, channels = convolution(section, channels), int(section["filters"])
            elif kind == "maxpool":
                layer = pooling(section)
            elif kind == "upsample":
                layer = nn.Upsample(scale_factor=int(section["stride"]), mode="nearest")
            elif kind == "route":
                channels = sum(widths[i if i >= 0 else number + i] for i in numbers(section["layers"]))
            elif kind != "yolo":
                raise DetectorError(
                    f"layer {number} is a [{kind}]; known: convolutional, maxpool, upsample, route, yolo."
                )
            self.layers.append(layer)
            widths.append(channels)
        self.read_weights(weights)
        self.freeze()

    def read_weights(self, path: Path) -> None:
        """Fill the convolutions from a `.weights` file: biases, batch norm, kernels, layer by layer."""
        values = torch.from_numpy(np.fromfile(path, dtype=np.float32)[HEADER:].copy())
        start = 0

        def fill(target: Tensor) -> None:
            nonlocal start
            part = values[start : start + target.numel()]
            if len(part) < target.numel():
                raise DetectorError(f"{path} ends too early, after {len(values)} values; it belongs to another .cfg.")
            target.data.copy_(part.view_as(target))
            start += target.numel()

        for convolutional in (layer for layer in self.layers if isinstance(layer, nn.Sequential)):
            kernel = convolutional[0]
            if not isinstance(kernel, nn.Conv2d):
                continue
            norm = convolutional[1] if len(convolutional) > 1 else None
            if isinstance(norm, nn.BatchNorm2d):
                assert norm.running_mean is not None
                assert norm.running_var is not None
                for target in (norm.bias, norm.weight, norm.running_mean, norm.running_var):
                    fill(target)
            elif kernel.bias is not None:
                fill(kernel.bias)
            fill(kernel.weight)
        if start != len(values):
            raise DetectorError(
                f"{path} has {len(values)} values and the .cfg needs {start}; they do not belong together."
            )

    def candidates(self, images: Tensor) -> Candidates:
        outputs: list[Tensor] = []
        found: list[Candidates] = []
        x = images
        for number, (section, layer) in enumerate(zip(self.sections, self.layers, strict=True)):
            if section["type"] == "route":
                x = torch.cat([outputs[i if i >= 0 else number + i] for i in numbers(section["layers"])], dim=1)
            elif section["type"] == "yolo":
                found.append(self.head(x, section))
            else:
                x = layer(x)
            outputs.append(x)
        return Candidates(torch.cat([f.boxes for f in found], dim=1), torch.cat([f.scores for f in found], dim=1))

    def head(self, x: Tensor, section: Section) -> Candidates:
        """The boxes of one YOLO head from its map `[B, anchors * (5 + classes), h, w]`."""
        sizes = torch.tensor(numbers(section["anchors"])).view(-1, 2)
        anchors = sizes[numbers(section["mask"])].to(x)
        batch, _, height, width = x.shape
        stride = self.input_size / width
        t = x.view(batch, len(anchors), -1, height, width).permute(0, 1, 3, 4, 2)
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        cell = torch.stack([columns, rows], dim=-1).to(x)
        centre = (t[..., :2].sigmoid() + cell) * stride
        half = anchors[:, None, None] * t[..., 2:4].clamp_max(LARGEST).exp() / 2
        scores = t[..., 4].sigmoid() * t[..., 5 + PERSON].sigmoid()
        return Candidates(
            torch.cat([centre - half, centre + half], dim=-1).reshape(batch, -1, 4), scores.reshape(batch, -1)
        )
