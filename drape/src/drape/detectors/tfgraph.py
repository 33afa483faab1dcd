"""Tensorflow graphs as torch modules: a reader of TF.js graph models, and an interpreter of the operations they use.

Only what the asked outputs depend on is run, so decoders that end in sorting or gathering are never needed. Tensors
keep Tensorflow's layout (batch, height, width, channels) between operations.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drape.errors import DetectorError

__all__ = ["Graph", "Node", "TFGraph", "read_tfjs", "sizes_for"]

DTYPES = {"float32": np.float32, "int32": np.int32, "float16": np.float16, "uint8": np.uint8, "uint16": np.uint16}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"Relu": F.relu, "Relu6": F.relu6}


@dataclass(frozen=True)
class Node:
    """One operation: its kind, the names it reads, and its attributes as plain values."""

    name: str
    op: str
    inputs: tuple[str, ...]
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Graph:
    """A graph: its operations by name, and its constants."""

    nodes: dict[str, Node]
    constants: dict[str, Tensor]


def plain(value: dict[str, Any]) -> Any:
    """One TF.js attribute as a plain value: int, float, bool, text, or a list of them."""
    if "list" in value:
        kind, items = next(iter(value["list"].items()), ("i", []))
        return [plain({kind: item}) for item in items]
    if "i" in value:
        return int(value["i"])
    if "s" in value:
        return base64.b64decode(value["s"]).decode()
    return value.get("f", value.get("b"))


def read_tfjs(model: Path) -> Graph:
    """A TF.js graph model: `model` is the JSON file, its binary files lie beside it."""
    try:
        description = json.loads(model.read_text())
        nodes = description["modelTopology"]["node"]
        manifest = description["weightsManifest"]
    except (ValueError, KeyError) as error:
        raise DetectorError(f"{model} is no TF.js graph model ({error!r}); expected its model.json.") from error
    constants: dict[str, Tensor] = {}
    for group in manifest:
        data = b"".join((model.parent / path).read_bytes() for path in group["paths"])
        start = 0
        for weight in group["weights"]:
            quantization = weight.get("quantization", {})
            dtype = np.dtype(DTYPES[quantization.get("dtype", weight["dtype"])])
            count = int(np.prod(weight["shape"]))
            array = np.frombuffer(data, dtype, count, start).reshape(weight["shape"])
            start += count * dtype.itemsize
            constants[weight["name"]] = torch.from_numpy(dequantize(array, quantization, weight["dtype"]))
    read = [
        Node(n["name"], n["op"], tuple(n.get("input", ())), {k: plain(v) for k, v in n.get("attr", {}).items()})
        for n in nodes
    ]
    return Graph({n.name: n for n in read}, constants)


def dequantize(array: np.ndarray, quantization: dict[str, Any], dtype: str) -> np.ndarray:
    """The weights in the type that the graph computes in."""
    values = array.astype(DTYPES[dtype])
    if "scale" in quantization:
        values = values * DTYPES[dtype](quantization["scale"]) + DTYPES[dtype](quantization["min"])
    return values


def same_padding(x: Tensor, kernel: Sequence[int], stride: Sequence[int], value: float = 0.0) -> Tensor:
    """Tensorflow's SAME: the surplus pixel goes to the bottom and the right. `x` is `[B, C, H, W]`."""
    sides: list[int] = []
    for length, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        total = max((-(-length // s) - 1) * s + k - length, 0)
        sides += [total // 2, total - total // 2]
    return F.pad(x, sides, value=value)


def convolve(node: Node, inputs: Sequence[Tensor]) -> Tensor:
    """Conv2D and DepthwiseConv2dNative, with the bias and activation that are fused into them."""
    x, kernel = inputs[0].permute(0, 3, 1, 2), inputs[1]
    stride = node.attributes["strides"][1:3]
    groups = 1
    if "Depthwise" in node.op:
        groups = kernel.shape[2]
        kernel = kernel.permute(2, 3, 0, 1).reshape(-1, 1, *kernel.shape[:2])
    else:
        kernel = kernel.permute(3, 2, 0, 1)
    if node.attributes["padding"] == "SAME":
        x = same_padding(x, kernel.shape[2:], stride)
    bias = inputs[2] if len(inputs) > 2 else None
    y = F.conv2d(x, kernel, bias, stride, groups=groups).permute(0, 2, 3, 1)
    for name in node.attributes.get("fused_ops", []):
        if name != "BiasAdd":
            y = ACTIVATIONS[name](y)
    return y


def pool(node: Node, inputs: Sequence[Tensor]) -> Tensor:
    """MaxPool."""
    kernel, stride = node.attributes["ksize"][1:3], node.attributes["strides"][1:3]
    x = inputs[0].permute(0, 3, 1, 2)
    if node.attributes["padding"] == "SAME":
        x = same_padding(x, kernel, stride, value=-torch.inf)
    return F.max_pool2d(x, kernel, stride).permute(0, 2, 3, 1)


def resize(node: Node, inputs: Sequence[Tensor]) -> Tensor:
    """ResizeBilinear, with half-pixel centres or with Tensorflow 1's corner-aligned origin (whole-number factors)."""
    x, size = inputs[0].permute(0, 3, 1, 2), [int(v) for v in inputs[1]]
    if node.attributes.get("half_pixel_centers"):
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    scale = [new // old for new, old in zip(size, x.shape[2:], strict=True)]
    ends = F.pad(x, (0, 1, 0, 1), mode="replicate")
    full = [old * s + 1 for old, s in zip(x.shape[2:], scale, strict=True)]
    return F.interpolate(ends, size=full, mode="bilinear", align_corners=True)[..., : size[0], : size[1]].permute(
        0, 2, 3, 1
    )


def pad(node: Node, inputs: Sequence[Tensor]) -> Tensor:
    """Pad and PadV2 with constants."""
    sides = [int(v) for before_after in reversed(inputs[1].tolist()) for v in before_after]
    return F.pad(inputs[0], sides, value=float(inputs[2]) if len(inputs) > 2 else 0.0)


def split(node: Node, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """SplitV."""
    return inputs[0].split([int(v) for v in inputs[1]], dim=int(inputs[2]))


def reshape(node: Node, inputs: Sequence[Tensor]) -> Tensor:
    """Reshape; a leading 1 stands for the batch, which the graphs were exported with a size of 1 for."""
    shape = [int(v) for v in inputs[1]]
    if shape and shape[0] == 1:
        shape[0] = inputs[0].shape[0]
    return inputs[0].reshape(shape)


def mean(node: Node, inputs: Sequence[Tensor]) -> Tensor:
    """Mean over the named axes."""
    return inputs[0].mean(dim=inputs[1].reshape(-1).tolist(), keepdim=bool(node.attributes.get("keep_dims")))


def sparse_to_dense(node: Node, inputs: Sequence[Tensor]) -> Tensor:
    """SparseToDense with no more than one axis: places of the values, length, values, and the value elsewhere."""
    places, length, values, default = inputs
    dense = torch.full(length.tolist(), default.item(), dtype=default.dtype, device=default.device)
    return dense.index_put((places.reshape(-1).long(),), values.to(dense))


OPERATIONS: dict[str, Callable[[Node, Sequence[Tensor]], Tensor | tuple[Tensor, ...]]] = {
    **dict.fromkeys(
        ("Conv2D", "_FusedConv2D", "DepthwiseConv2dNative", "FusedDepthwiseConv2dNative"),
        convolve,
    ),
    **dict.fromkeys(("Add", "AddV2", "BiasAdd"), lambda node, x: x[0] + x[1]),
    "Mul": lambda node, x: x[0] * x[1],
    "Relu": lambda node, x: F.relu(x[0]),
    "Relu6": lambda node, x: F.relu6(x[0]),
    "LeakyRelu": lambda node, x: F.leaky_relu(x[0], node.attributes["alpha"]),
    "Sigmoid": lambda node, x: x[0].sigmoid(),
    "Identity": lambda node, x: x[0],
    "ConcatV2": lambda node, x: torch.cat(list(x[:-1]), dim=int(x[-1])),
    "Transpose": lambda node, x: x[0].permute(x[1].tolist()),
    "Mean": mean,
    "MaxPool": pool,
    "Pad": pad,
    "PadV2": pad,
    "Reshape": reshape,
    "ResizeBilinear": resize,
    "SparseToDense": sparse_to_dense,
    "SplitV": split,
}


class TFGraph(nn.Module):
    """A graph as a torch module; float constants are parameters, so it can be fine-tuned.

    Args:
        graph: what was read.  outputs: names of the operations to compute.  overrides: replace constants.

    Raises:
        DetectorError: an output or an operation is not known.
    """

    def __init__(self, graph: Graph, outputs: Sequence[str], overrides: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        constants = {**graph.constants, **(overrides or {})}
        self.outputs = tuple(outputs)
        self.order: list[Node] = []
        self.places: dict[str, str] = {}
        self.source = ""
        seen: set[str] = set()
        for name in outputs:
            self.visit(name, graph, constants, seen)

    def visit(self, name: str, graph: Graph, constants: dict[str, Tensor], seen: set[str]) -> None:
        """Put an operation behind those it reads, depth first."""
        stack = [(name, False)]
        while stack:
            current, ready = stack.pop()
            if current in constants:
                self.store(current, constants[current])
                continue
            if current not in graph.nodes:
                raise DetectorError(f"the graph has no operation {current!r}; it is another model than expected.")
            node = graph.nodes[current]
            if ready:
                self.order.append(node)
            elif current not in seen:
                seen.add(current)
                if node.op == "Placeholder":
                    self.source = current
                    continue
                if node.op not in OPERATIONS:
                    raise DetectorError(
                        f"operation {node.op} ({current}) is not known; known: {', '.join(OPERATIONS)}."
                    )
                stack.append((current, True))
                stack.extend((plain_name(i), False) for i in node.inputs if not i.startswith("^"))

    def store(self, name: str, value: Tensor) -> None:
        """Keep a constant: floats as parameters, the rest as buffers."""
        if name in self.places:
            return
        self.places[name] = f"constant_{len(self.places)}"
        if value.is_floating_point():
            self.register_parameter(self.places[name], nn.Parameter(value, requires_grad=False))
        else:
            self.register_buffer(self.places[name], value)

    def weights(self) -> list[nn.Parameter]:
        """Kernels and biases in the order in which they are used; single numbers are left out."""
        names = [plain_name(name) for node in self.order for name in node.inputs]
        used = dict.fromkeys(self.places[name] for name in names if name in self.places)
        found = (getattr(self, place) for place in used)
        return [value for value in found if isinstance(value, nn.Parameter) and value.numel() > 1]

    def forward(self, x: Tensor) -> list[Tensor]:
        """The outputs for an input in the graph's own layout."""
        values: dict[str, Tensor | tuple[Tensor, ...]] = {self.source: x}
        values.update({name: getattr(self, place) for name, place in self.places.items()})
        for node in self.order:
            inputs = [pick(values, name) for name in node.inputs if not name.startswith("^")]
            values[node.name] = OPERATIONS[node.op](node, inputs)
        return [pick(values, name) for name in self.outputs]


def sizes_for(graph: Graph, ratio: float) -> dict[str, Tensor]:
    """`overrides` of a `TFGraph` for an input `ratio` times as large: the sizes that it resizes its maps to."""
    names = {plain_name(node.inputs[1]) for node in graph.nodes.values() if node.op == "ResizeBilinear"}
    known = {name: graph.constants[name] for name in names if name in graph.constants}
    return {name: (size * ratio).round().to(size.dtype) for name, size in known.items()}


def plain_name(name: str) -> str:
    """An input's operation, without the number of its output."""
    return name.partition(":")[0]


def pick(values: dict[str, Tensor | tuple[Tensor, ...]], name: str) -> Tensor:
    """One output of an operation; `name:2` is its third."""
    base, _, number = name.partition(":")
    value = values[base]
    return value[int(number or 0)] if isinstance(value, tuple) else value
