"""A causal video transformer of Wan 2.1 1.3B's shape with random weights, of which nothing but its cost is asked.

30 layers, 12 heads of width 128, 1,560 tokens per latent frame (480x832), chunks of three frames, four denoising
forwards per chunk and one that keeps the clean chunk, as Self-Forcing runs it.

Shape legend: `B` batch, `q` frames of the chunk, `L` tokens of a frame, `H` heads, `D` width of a head, `W` = `H D`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from harness import Device
from hasten.streaming import KVStream
from models import made_on
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

FORWARDS = 4  # denoising steps per chunk


@dataclass(frozen=True)
class Size:
    """Of the model and its frames."""

    layers: int = 30
    heads: int = 12
    head_width: int = 128
    inner: int = 8960
    tokens: int = 1560
    text: int = 512
    chunk: int = 3

    @property
    def width(self) -> int:
        return self.heads * self.head_width


TINY = Size(layers=2, heads=2, head_width=16, inner=64, tokens=12, text=8)


class Layer(nn.Module):
    """Self-attention through a stream, attention to the text, feed-forward."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        W, self.size = size.width, size
        self.norms = nn.ModuleList(nn.LayerNorm(W, elementwise_affine=False) for _ in range(3))
        self.qkv, self.out = nn.Linear(W, 3 * W), nn.Linear(W, W)
        self.query, self.known, self.told = nn.Linear(W, W), nn.Linear(W, 2 * W), nn.Linear(W, W)
        self.mlp = nn.Sequential(nn.Linear(W, size.inner), nn.GELU("tanh"), nn.Linear(size.inner, W))

    def forward(self, x: Tensor, text: Tensor, stream: KVStream, layer: int, keep: bool) -> Tensor:
        """Tokens `[B, q, L, W]` and text `[B, T, W]` to tokens."""
        B, q, L, _ = x.shape
        H, D = self.size.heads, self.size.head_width
        own = self.qkv(self.norms[0](x)).view(B, q, L, 3, H, D).unbind(3)
        x = x + self.out(stream.attend(layer, *own).flatten(3))
        if keep:
            stream[layer].append(own[1], own[2])
        queries = self.query(self.norms[1](x)).view(B, q * L, H, D).transpose(1, 2)
        keys, values = self.known(text).view(B, -1, 2, H, D).permute(2, 0, 3, 1, 4)
        told = scaled_dot_product_attention(queries, keys, values).transpose(1, 2).reshape(B, q, L, -1)
        x = x + self.told(told)
        return x + self.mlp(self.norms[2](x))


class CausalVideo(nn.Module):
    """All layers."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))

    def forward(self, x: Tensor, text: Tensor, stream: KVStream, keep: bool = False) -> Tensor:
        """One forward of a chunk."""
        for number, layer in enumerate(self.layers):
            x = layer(x, text, stream, number, keep)
        return x


def causal_video(device: Device, dry: bool) -> CausalVideo:
    """The model on the device."""
    torch.manual_seed(0)
    with made_on(device):
        return CausalVideo(TINY if dry else Size()).eval().requires_grad_(False)


def rolled_out(model: CausalVideo, stream: KVStream, chunks: int) -> None:
    """Roll out, each chunk from noise of its own."""
    size, weight = model.size, next(model.parameters())
    generator = torch.Generator(weight.device).manual_seed(0)
    text = torch.zeros(1, size.text, size.width, device=weight.device, dtype=weight.dtype)
    for _ in range(chunks):
        shape = (1, size.chunk, size.tokens, size.width)
        x = torch.randn(shape, generator=generator, device=weight.device, dtype=weight.dtype)
        for _ in range(FORWARDS):
            x = torch.lerp(x, model(x, text, stream), 0.25)
        model(x, text, stream, keep=True)
