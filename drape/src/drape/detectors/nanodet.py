"""NanoDet (https://github.com/RangiLyu/nanodet, Apache-2.0): anchor-free, boxes as distributions of distances.

The head follows Generalized Focal Loss (Li et al., arXiv:2006.04388): for each side of the box a distribution over
0..10 strides, whose mean is the distance from the cell's centre. Scores are sigmoids of the classes.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from drape.detectors.base import Candidates, Detector
from drape.detectors.tfgraph import TFGraph, read_tfjs, sizes_for

__all__ = ["NanoDet"]

PERSON = 0
NATIVE = 416  # pixels
STRIDES = (8, 16, 32)
BINS = 11
CLASSES = ("Identity", "Identity_1", "Identity_2")  # one per stride
SIDES = ("Identity_3", "Identity_4", "Identity_5")


class NanoDet(Detector):
    """The RepVGG variant, from a TF.js graph that was made for 416 px.

    Args:
        model: the JSON file; the weights lie beside it.  input_size: a multiple of 32.
    """

    def __init__(self, model: Path, name: str = "nanodet", input_size: int = NATIVE) -> None:
        super().__init__(name, input_size, threshold=0.35)  # scores of the focal loss run low
        graph = read_tfjs(model)
        self.graph = TFGraph(graph, CLASSES + SIDES, sizes_for(graph, input_size / NATIVE))
        self.freeze()

    def weights(self) -> list[nn.Parameter]:
        return self.graph.weights()

    def candidates(self, images: Tensor) -> Candidates:
        outputs = self.graph(images)
        boxes, scores = [], []
        for stride, classes, sides in zip(STRIDES, outputs[:3], outputs[3:], strict=True):
            cells = self.input_size // stride
            ys, xs = torch.meshgrid(torch.arange(cells), torch.arange(cells), indexing="ij")
            centre = (torch.stack([xs, ys], dim=-1).reshape(-1, 2).to(images) + 0.5) * stride
            share = sides.reshape(len(images), -1, 4, BINS).softmax(dim=-1)
            distance = (share * torch.arange(BINS).to(images)).sum(dim=-1) * stride
            boxes.append(torch.cat([centre - distance[..., :2], centre + distance[..., 2:]], dim=-1))
            scores.append(classes.reshape(len(images), -1, classes.shape[-1])[..., PERSON])
        return Candidates(torch.cat(boxes, dim=1), torch.cat(scores, dim=1))
