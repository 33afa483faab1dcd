"""A garment's texture: a few locked colours, placed by control points, chosen per pixel by Gumbel-softmax.

AdvCaT (Hu et al., CVPR 2023, arXiv:2303.08010), adapted. With palette `c_1..c_K` and `n` control points `b_cj` a
colour:

    p_c(x) = sum_j exp(-||x - b_cj|| / blur) / sum_{c', j} exp(-||x - b_c'j|| / blur)     then a 3x3 box filter
    y      = softmax((log p + g) / tau),  g Gumbel noise                                   (training)
    y      = onehot(argmax log p)                                                          (evaluation)

Departures: the noise is drawn again at every call, where AdvCaT keeps a partly trainable seed map; evaluation has
none, so trained seeds would be lost there anyway. The palette is constant and locked to a gamut first (`drape.gamut`).

Shapes: `K` colours, `n` control points per colour, `h, w` texture cells, `H = h * expand`, `W = w * expand`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
from skimage.color import lab2rgb, rgb2lab
from torch import Tensor, nn

from drape.errors import ConfigError
from drape.gamut import Gamut

__all__ = ["ControlPointTexture", "TextureSpec", "farthest_points", "palette_and_labels"]


@dataclass(frozen=True, kw_only=True)
class TextureSpec:
    """Size and parameters of one garment's texture.

    Args:
        height, width: cells; the texture has `expand` times as many pixels each way.
        colours: K, 2 to 16.
        points: n, control points per colour.
        blur: length in cells over which a control point's pull falls by e.
        tau, noise: temperature of the Gumbel-softmax, and the share of the noise that is added; 1 in AdvCaT.
        expand: pixels per cell, each way.
    """

    height: int = 85
    width: int = 216
    colours: int = 4
    points: int = 60
    blur: float = 1.0
    tau: float = 0.3
    noise: float = 1.0
    expand: int = 4

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 3:
            raise ConfigError(f"a texture of {self.height}x{self.width} cells is too small; expected at least 3x3.")
        if not 2 <= self.colours <= 16:
            raise ConfigError(f"colours={self.colours}; expected 2 to 16.")
        if self.points < 1 or self.expand < 1:
            raise ConfigError(f"points={self.points}, expand={self.expand}; expected at least 1 each.")
        if not (self.blur > 0 and self.tau > 0) or self.noise < 0:
            raise ConfigError(f"blur={self.blur}, tau={self.tau}, noise={self.noise}; expected > 0, > 0 and >= 0.")


class ControlPointTexture(nn.Module):
    """The texture of one garment; its only parameter is `points`, float32 `[K, n, 2]` as (x, y) in [0, 1].

    Args:
        spec: size and parameters.
        palette: `[K, 3]` sRGB in [0, 1].
        gamut: the palette is locked to it here, once.
        points: where to begin; uniformly random if not given.
        generator: of the random points.

    Raises:
        ConfigError: palette or points do not fit the spec.
    """

    palette: Tensor
    cells: Tensor

    def __init__(
        self,
        spec: TextureSpec,
        palette: Tensor,
        gamut: Gamut,
        points: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if palette.shape != (spec.colours, 3):
            raise ConfigError(f"palette has shape {tuple(palette.shape)}; expected {(spec.colours, 3)} as in the spec.")
        if points is None:
            points = torch.rand(spec.colours, spec.points, 2, generator=generator)
        if points.shape != (spec.colours, spec.points, 2):
            raise ConfigError(f"points have shape {tuple(points.shape)}; expected {(spec.colours, spec.points, 2)}.")
        self.spec = spec
        self.points = nn.Parameter(points.clone())
        self.register_buffer("palette", gamut.lock(palette))
        ys, xs = torch.meshgrid(torch.arange(spec.height) + 0.5, torch.arange(spec.width) + 0.5, indexing="ij")
        self.register_buffer("cells", torch.stack([xs, ys], dim=-1).reshape(-1, 2), persistent=False)

    def points_in_cells(self) -> Tensor:
        """Control points in cells, `[K, n, 2]`."""
        return self.points * self.points.new_tensor([self.spec.width, self.spec.height])

    def log_probability(self) -> Tensor:
        """log p, `[K, h, w]`, after the box filter."""
        spec = self.spec
        distance = torch.cdist(self.cells, self.points_in_cells().reshape(-1, 2))
        pull = (-distance / spec.blur).reshape(-1, spec.colours, spec.points).logsumexp(dim=-1)
        p = pull.softmax(dim=-1).T.reshape(1, spec.colours, spec.height, spec.width)
        smooth = F.avg_pool2d(F.pad(p, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        return smooth[0].clamp_min(1e-12).log()

    def choice(self, *, hard: bool, generator: torch.Generator | None = None) -> Tensor:
        """Weights of the colours, `[K, h, w]`, summing to 1: soft with noise, or one-hot without."""
        logits = self.log_probability()
        if hard:
            return F.one_hot(logits.argmax(dim=0), self.spec.colours).permute(2, 0, 1).to(logits)
        uniform = torch.rand(logits.shape, generator=generator).clamp(1e-6, 1 - 1e-6).to(logits)
        noise = -(-uniform.log()).log()
        return ((logits + self.spec.noise * noise) / self.spec.tau).softmax(dim=0)

    def forward(self, *, hard: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """The texture, `[3, H, W]` in [0, 1].

        Args:
            hard: the palette's colours only, no noise: what is evaluated, and what could be printed.
            generator: of the noise, when not hard.
        """
        image = torch.einsum("khw,kc->chw", self.choice(hard=hard, generator=generator), self.palette)
        return image.repeat_interleave(self.spec.expand, dim=1).repeat_interleave(self.spec.expand, dim=2)

    @torch.no_grad()
    def clamp_points(self) -> None:
        """Bring points that an optimiser moved out of the garment back to its edge."""
        self.points.clamp_(0.0, 1.0)

    @classmethod
    def from_product(
        cls, spec: TextureSpec, image: np.ndarray, gamut: Gamut, *, seed: int = 0, fit_steps: int = 200
    ) -> tuple[ControlPointTexture, Tensor]:
        """A texture that looks like a product's image, and the label map `[h, w]` that it was fitted to.

        Args:
            image: uint8 or float RGB `[height, width, 3]`, already laid out in the garment's uv square.
            fit_steps: steps of Adam on the cross-entropy of p and the label map.
        """
        palette, labels = palette_and_labels(image, spec, seed=seed)
        rng = np.random.default_rng(seed)
        points = torch.stack([farthest_points(labels == colour, spec.points, rng) for colour in range(spec.colours)])
        texture = cls(spec, palette, gamut, points)
        target = torch.from_numpy(labels)
        optimiser = torch.optim.Adam([texture.points], lr=1e-3)
        for _ in range(fit_steps):
            optimiser.zero_grad()
            loss = F.nll_loss(texture.log_probability()[None], target[None])
            loss.backward()
            optimiser.step()
            texture.clamp_points()
        return texture, target


def palette_and_labels(image: np.ndarray, spec: TextureSpec, *, seed: int = 0) -> tuple[Tensor, np.ndarray]:
    """K colours by k-means in CIELAB, float32 `[K, 3]`, and the nearest one of each cell, int64 `[h, w]`.

    Raises:
        ConfigError: the image is no RGB image, or has fewer than K different colours.
    """
    if image.ndim != 3 or image.shape[2] != 3:
        raise ConfigError(f"the product image has shape {image.shape}; expected [height, width, 3] RGB.")
    scale = 255.0 if image.dtype == np.uint8 else 1.0
    chw = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / scale
    small = F.interpolate(chw, size=(spec.height, spec.width), mode="area")[0].permute(1, 2, 0).numpy()
    lab = rgb2lab(small.astype(np.float64)).reshape(-1, 3)
    if len(np.unique(lab.round(2), axis=0)) < spec.colours:
        raise ConfigError(f"the product image has fewer than {spec.colours} colours; give one with more.")
    centres, labels = kmeans2(lab, spec.colours, minit="++", rng=np.random.default_rng(seed), iter=30)
    if len(np.unique(labels)) < spec.colours:
        raise ConfigError(f"k-means found fewer than {spec.colours} colours in the image; use another seed or fewer.")
    palette = np.clip(lab2rgb(centres[None])[0], 0.0, 1.0)
    return torch.from_numpy(palette).float(), labels.reshape(spec.height, spec.width).astype(np.int64)


def farthest_points(region: np.ndarray, count: int, rng: np.random.Generator) -> Tensor:
    """Farthest-point sampling of cells in a region, float32 `[count, 2]` as (x, y) in [0, 1].

    Args:
        region: bool `[h, w]` with at least one cell; with fewer than `count` cells some are taken twice.
    """
    cells = np.argwhere(region)
    if len(cells) == 0:
        raise ConfigError("the region has no cells; expected at least one.")
    chosen = [int(rng.integers(len(cells)))]
    nearest = np.linalg.norm(cells - cells[chosen[0]], axis=1)
    for _ in range(count - 1):
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, np.linalg.norm(cells - cells[chosen[-1]], axis=1))
    height, width = region.shape
    xy = (cells[chosen][:, ::-1] + 0.5) / np.array([width, height])
    return torch.from_numpy(xy.copy()).float()
