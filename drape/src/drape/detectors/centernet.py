"""CenterNet with a MobileNetV3 trunk: a heat map of centres and the distances to the four sides.

Zhou et al., "Objects as Points", arXiv:1904.07850. A cell is a candidate where it is the largest of its 3x3 neighbours.
The network predicts distances from the cell to the left, top, right and bottom, as the end of its own graph shows.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drape.detectors.base import Candidates, Detector
from drape.detectors.tfgraph import TFGraph, read_tfjs, sizes_for

__all__ = ["CenterNet"]

PERSON = 0
NATIVE = 512  # pixels
STRIDE = 4


class CenterNet(Detector):
    """The network of 80 COCO classes, from a TF.js graph that was made for 512 px.

    Args:
        model: the JSON file; the weights lie beside it.  input_size: a multiple of 32.
    """

    def __init__(self, model: Path, name: str = "centernet", input_size: int = NATIVE) -> None:
        super().__init__(name, input_size, threshold=0.3)  # as its authors show boxes
        graph = read_tfjs(model)
        self.graph = TFGraph(graph, ("tower_0/keypoints", "tower_0/wh"), sizes_for(graph, input_size / NATIVE))
        self.freeze()

    def weights(self) -> list[nn.Parameter]:
        return self.graph.weights()

    def candidates(self, images: Tensor) -> Candidates:
        heat, sides = self.graph(images.permute(0, 2, 3, 1) * 255)
        person = heat[..., PERSON]
        peak = person >= F.max_pool2d(person[:, None], 3, stride=1, padding=1)[:, 0]
        ys, xs = torch.meshgrid(torch.arange(heat.shape[1]), torch.arange(heat.shape[2]), indexing="ij")
        cell = torch.stack([xs, ys], dim=-1).to(images) * STRIDE
        boxes = torch.cat([cell - sides[..., :2], cell + sides[..., 2:]], dim=-1)
        return Candidates(boxes.reshape(len(images), -1, 4), (person * peak).reshape(len(images), -1))
