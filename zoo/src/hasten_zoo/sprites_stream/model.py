"""The transformer of `sprites-stream`: chunk-wise causal video diffusion on pixels.

A chunk of three frames is denoised at once and sees itself and all finished chunks, whose keys and values are kept from
a last pass over the clean chunk. Rotary positions are (frame, row, column); the names and the noise level modulate the
norms (adaptive layer norm), and each token is told how far to its side the objects are. Rectified flow: with
`x_t = (1 - t) x_0 + t eps` the output is `eps - x_0`, by way of an estimate of `x_0`, so that no noise has to be
carried through a width that hardly exceeds a patch.

Training runs all chunks at once on a clean copy and a noisy copy of the video: a clean chunk sees clean chunks up to
itself, and a noisy chunk sees itself and the clean chunks before it (teacher forcing).

Shape legend: `B` batch, `F` frames, `L` tokens of a frame, `H` heads, `D` width of a head, `W` width of the model.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from hasten.errors import ConfigError, ModelError
from hasten.io import Kind
from hasten.streaming.attention import Backend
from hasten.streaming.method import StreamingMethod
from hasten.streaming.policy import KVStream
from hasten.streaming.rotation import undo_rotation
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from hasten_zoo.sprites_stream.data import SPRITE, UNNAMED
from hasten_zoo.weights import read_weights, write_weights

__all__ = ["CausalVideoTransformer", "ModelConfig", "load_model", "new_stream", "save_model"]

TIME_BASE, PLACE_BASE = 1000.0, 100.0
WAVES = 64  # channels in which a noise level is written
SMALLEST = 0.01  # noise level down to which the velocity is that of the estimate
MOST = 4096  # of any size
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class ModelConfig:
    """Sizes. `side` and `patch` in pixels; `chunk` in frames."""

    side: int = 48
    patch: int = 6
    chunk: int = 3
    width: int = 128
    heads: int = 4
    layers: int = 5
    mlp: int = 3

    def __post_init__(self) -> None:
        if not all(1 <= size <= MOST for size in vars(self).values()):
            raise ConfigError(f"sizes are 1 to {MOST}, got {self}")
        if self.side % self.patch or self.width % self.heads or (self.width // self.heads) % 8:
            raise ConfigError(
                "expected patches that fill the side, and heads that divide the width into multiples of 8, got "
                f"side {self.side}, patch {self.patch}, width {self.width}, heads {self.heads}"
            )

    @property
    def grid(self) -> int:
        return self.side // self.patch

    @property
    def tokens(self) -> int:
        return self.grid**2

    @property
    def head_width(self) -> int:
        return self.width // self.heads


class Rotary(nn.Module):
    """Rotation of queries and keys by (frame, row, column): a quarter of the channels for time, the rest for place."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        pairs = config.head_width // 2
        self.time = pairs // 4
        place = (pairs - self.time) // 2
        self.register_buffer("rates", TIME_BASE ** -(torch.arange(self.time) / self.time), persistent=False)
        rates = PLACE_BASE ** -(torch.arange(place) / place)
        at = torch.arange(config.grid, dtype=torch.float32)[:, None] * rates
        rows, columns = at[:, None].expand(-1, config.grid, -1), at[None].expand(config.grid, -1, -1)
        spare = torch.zeros(config.grid, config.grid, pairs - self.time - 2 * place)
        self.register_buffer("places", torch.cat([rows, columns, spare], 2).flatten(0, 1), persistent=False)
        self.rates: Tensor
        self.places: Tensor

    def forward(self, tokens: Tensor, frames: Tensor) -> Tensor:
        """Rotate `[B, F, L, H, D]` of these frames `[F]`."""
        time = frames[:, None].float() * self.rates
        angles = torch.cat([time[:, None].expand(-1, len(self.places), -1), self.places.expand(len(frames), -1, -1)], 2)
        return _turned(tokens, angles[:, :, None])

    def unrotate(self, keys: Tensor, frames: Tensor) -> Tensor:
        """Undo the rotation along time of keys `[B, H, F, L, D]`; float32."""
        angles = frames[:, None] * self.rates
        return undo_rotation(keys, torch.polar(torch.ones_like(angles), angles))


def _waves(x: Tensor) -> Tensor:
    """`[..., WAVES]` cosines and sines of a number, at rates from 1 down to a thousandth."""
    angles = x[..., None] * torch.exp(-math.log(1000.0) * torch.arange(WAVES // 2, device=x.device) / (WAVES // 2))
    return torch.cat([angles.cos(), angles.sin()], -1)


def _turned(tokens: Tensor, angles: Tensor) -> Tensor:
    """Neighbouring channels as complex numbers, turned by angles that broadcast over `[..., D / 2]`."""
    x, y = tokens.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos().to(tokens), angles.sin().to(tokens)
    return torch.stack([x * cos - y * sin, x * sin + y * cos], -1).flatten(-2)


class Block(nn.Module):
    """Attention and feed-forward, modulated by the frame."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        W = config.width
        self.config = config
        self.norm1 = nn.LayerNorm(W, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(W, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(W, 3 * W), nn.Linear(W, W)
        self.norm_q, self.norm_k = nn.RMSNorm(config.head_width), nn.RMSNorm(config.head_width)
        self.mlp = nn.Sequential(nn.Linear(W, config.mlp * W), nn.GELU("tanh"), nn.Linear(config.mlp * W, W))
        self.modulation = nn.Parameter(torch.zeros(6, W))

    def project(self, x: Tensor, parts: Tensor) -> list[Tensor]:
        """Queries, keys and values `[B, F, L, H, D]` of tokens `[B, F, L, W]`; queries and keys not yet rotated."""
        modulated = self.norm1(x) * (1 + parts[:, :, 0]) + parts[:, :, 1]
        q, k, v = self.qkv(modulated).unflatten(-1, (3, self.config.heads, -1)).unbind(3)
        return [self.norm_q(q), self.norm_k(k), v]

    def finish(self, x: Tensor, attended: Tensor, parts: Tensor) -> Tensor:
        """Add the attention's output `[B, F, L, H, D]` and the feed-forward."""
        x = x + parts[:, :, 2] * self.out(attended.flatten(3))
        return x + parts[:, :, 5] * self.mlp(self.norm2(x) * (1 + parts[:, :, 3]) + parts[:, :, 4])


class CausalVideoTransformer(nn.Module):
    """See the head of the file."""

    def __init__(self, config: ModelConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ModelConfig()
        W, pixels = config.width, 3 * config.patch**2
        self.embed, self.head = nn.Linear(pixels, W), nn.Linear(W, pixels)
        self.norm = nn.LayerNorm(W, elementwise_affine=False)
        self.names = nn.ModuleList(nn.Embedding(n + 1, W) for n in UNNAMED)
        self.place = nn.Parameter(0.02 * torch.randn(config.tokens, W))
        self.reach = int(SPRITE + config.patch) // 2  # pixels from a patch's middle to that of an object that it shows
        self.offsets = nn.ModuleList(nn.Embedding(2 * self.reach + 2, W) for _ in range(2))
        columns = torch.arange(config.tokens) % config.grid * config.patch + config.patch // 2
        self.register_buffer("columns", columns, persistent=False)
        self.columns: Tensor
        self.times = nn.Sequential(nn.Linear(WAVES, W), nn.SiLU(), nn.Linear(W, W))
        self.modulate = nn.Sequential(nn.SiLU(), nn.Linear(W, 6 * W))
        self.last = nn.Sequential(nn.SiLU(), nn.Linear(W, 2 * W))
        self.rotary = Rotary(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        for layer in (self.modulate[1], self.last[1], self.head):
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def _tokens(self, video: Tensor, words: Tensor) -> Tensor:
        """Patches `[B, F, L, W]` of videos `[B, F, 3, side, side]`, told where they and the objects are."""
        p = self.config.patch
        patches = video.unflatten(4, (-1, p)).unflatten(3, (-1, p)).permute(0, 1, 3, 5, 2, 4, 6)
        tokens: Tensor = self.embed(patches.flatten(4).flatten(2, 3)) + self.place
        for i, table in enumerate(self.offsets):
            away = self.reach + 1  # one entry for everything that is out of reach
            offset = words[..., len(UNNAMED) + i, None] - self.columns
            tokens = tokens + table(torch.where(offset.abs() < away, offset + self.reach, 2 * self.reach + 1))
        return tokens

    def _pixels(self, tokens: Tensor) -> Tensor:
        """The reverse, through the output layer."""
        p, g = self.config.patch, self.config.grid
        patches = self.head(tokens).unflatten(3, (3, p, p)).unflatten(2, (g, g))
        return patches.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)

    def _frame_state(self, t: Tensor, words: Tensor) -> Tensor:
        """`[B, F, W]` from noise levels `[B, F]` and words `[B, F, 5]`."""
        state: Tensor = self.times(_waves(1000 * t.float()).to(self.embed.weight.dtype))
        for i, table in enumerate(self.names):
            state = state + table(words[..., i])
        return state

    def _parts(self, state: Tensor) -> Tensor:
        """Modulations `[B, F, 6, 1, W]` shared by the blocks; the gates are at 2 and 5."""
        return self.modulate(state).unflatten(2, (6, 1, -1))

    def _end(self, x: Tensor, state: Tensor, video: Tensor, t: Tensor) -> Tensor:
        """The velocity of noisy frames, from the tokens of their clean estimate."""
        scale, shift = self.last(state)[:, :, None].chunk(2, -1)
        clean = self._pixels(self.norm(x) * (1 + scale) + shift)
        return (video - clean) / t.clamp_min(SMALLEST)[:, :, None, None, None]

    def forward(
        self, video: Tensor, t: Tensor, words: Tensor, stream: KVStream, first: int, keep: bool = False
    ) -> Tensor:
        """The velocity of one chunk.

        Args:
            video: noisy frames `[B, F, 3, side, side]`.
            t: noise levels `[B, F]` in [0, 1].
            words: `[B, F, 5]`, see `conditions`.
            stream: what came before; see `new_stream`.
            first: number of the first of these frames.
            keep: append the chunk's keys and values to the stream (the last pass, over the clean chunk).

        Returns:
            Of the shape of `video`.
        """
        frames = torch.arange(first, first + video.shape[1], device=video.device)
        x, state = self._tokens(video, words), self._frame_state(t, words)
        shared = self._parts(state)
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            parts = shared + block.modulation[:, None]
            q, k, v = block.project(x, parts)
            q, k = self.rotary(q, frames), self.rotary(k, frames)
            attended = stream.attend(layer, q, k, v, first=first)
            if keep:
                stream[layer].append(k, v, first=first)
            x = block.finish(x, attended, parts)
        return self._end(x, state, video, t)

    def teach(self, clean: Tensor, t_clean: Tensor, noisy: Tensor, t: Tensor, words: Tensor) -> Tensor:
        """The velocities of all chunks at once, given clean (or nearly clean) copies of those before.

        Args:
            clean, noisy: `[B, F, 3, side, side]`.
            t_clean, t: `[B, F]`.
            words: `[B, F, 5]`.
        """
        F = clean.shape[1]
        frames = torch.arange(F, device=clean.device).repeat(2)
        both = torch.cat([words, words], 1)
        x, state = self._tokens(torch.cat([clean, noisy], 1), both), self._frame_state(torch.cat([t_clean, t], 1), both)
        shared = self._parts(state)
        for block in self.blocks:
            assert isinstance(block, Block)
            parts = shared + block.modulation[:, None]
            q, k, v = block.project(x, parts)
            q, k, v = (part.transpose(1, 3) for part in (self.rotary(q, frames), self.rotary(k, frames), v))
            out = teacher_attention(q, k, v, self.config.chunk)
            x = block.finish(x, out.transpose(1, 3), parts)
        return self._end(x[:, F:], state[:, F:], noisy, t)


def teacher_attention(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    """Attention of clean and noisy copies `[B, H, L, 2 F, D]` of a video, chunk by chunk, without a mask.

    A mask over both copies would compute three to four times as many products as are seen.
    """
    L, F = q.shape[2], q.shape[3] // 2
    parts = [x.transpose(2, 3).flatten(2, 3).split(chunk * L, 2) for x in (q, k, v)]
    (q_clean, q_noisy), (k_clean, k_noisy), (v_clean, v_noisy) = ((x[: F // chunk], x[F // chunk :]) for x in parts)
    clean, noisy = [], []
    for i in range(F // chunk):
        seen = torch.cat(k_clean[: i + 1], 2), torch.cat(v_clean[: i + 1], 2)
        clean.append(scaled_dot_product_attention(q_clean[i], *seen))
        seen = torch.cat([*k_clean[:i], k_noisy[i]], 2), torch.cat([*v_clean[:i], v_noisy[i]], 2)
        noisy.append(scaled_dot_product_attention(q_noisy[i], *seen))
    return torch.cat([*clean, *noisy], 2).unflatten(2, (2 * F, L)).transpose(2, 3)


def new_stream(
    model: CausalVideoTransformer, method: StreamingMethod, backend: Backend = "grouped", timed: bool = False
) -> KVStream:
    """An empty memory for one rollout of the model; `timed` takes times of its parts."""
    config = model.config
    facts = {"model": "sprites-stream", "layers": config.layers, "heads": config.heads, "chunk": config.chunk}
    return KVStream(method, config.layers, backend=backend, unrotate=model.rotary.unrotate, facts=facts, timed=timed)


KIND = Kind(
    "streaming model",
    ModelConfig,
    ModelError,
    "Reinstall hasten-zoo, or train and export it with python -m hasten_zoo.sprites_stream.train.",
)


def save_model(model: CausalVideoTransformer, folder: Path) -> None:
    """Write `model.safetensors`, in half precision."""
    write_weights(folder / WEIGHTS_FILE, KIND, model, asdict(model.config))


def load_model(folder: Path) -> CausalVideoTransformer:
    """Read what `save_model` wrote, as float32.

    Raises:
        ModelError: if the file is missing or damaged.
    """
    return read_weights(folder / WEIGHTS_FILE, KIND, CausalVideoTransformer).eval()
