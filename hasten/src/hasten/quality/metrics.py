"""Image metrics: how far an image made with skipped steps is from the one made without.

Every function takes the image under test first and the reference second. An image is a float tensor or array of
shape `[3, H, W]`, sRGB-encoded, in [0, 1]; anything else (8-bit integers, other shapes, NaN) raises `ValueError` rather
than giving a number that means something else.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from hasten.errors import ModelError

__all__ = [
    "PSNR_CEILING",
    "Lpips",
    "flip",
    "lpips",
    "over_frames",
    "psnr",
    "relative_l2",
    "ssim",
    "summary_statistics",
    "temporal_error",
]

Image = Tensor | npt.NDArray[np.floating[Any]]

RANGE_TOLERANCE = 1e-4  # rounding of half-precision decoders; values within it are clamped
PSNR_CEILING = 100.0  # dB; stands for infinity where identical images enter a mean
SSIM_WINDOW = 11  # side of a Gaussian of sigma 1.5 cut at 3.5 sigma
LPIPS_MIN_SIDE = 64  # the deepest layer still sees 8x8 positions
LPIPS_WEIGHTS = ("weights", "vST0.0", "alex_shift_tolerant.pth")


def _image(value: Image, name: str) -> Tensor:
    """`[3, H, W]` float64 on the CPU, clamped to [0, 1]; raises `ValueError` for what is not an image."""
    tensor = torch.as_tensor(value).detach().to("cpu")
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: dtype {tensor.dtype}; divide 8-bit images by 255 to get floats in [0, 1]")
    if tensor.ndim != 3 or tensor.shape[0] != 3 or 0 in tensor.shape:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)} is not [3, H, W]")
    tensor = tensor.double()
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name}: holds NaN or infinite values")
    low, high = float(tensor.min()), float(tensor.max())
    if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        raise ValueError(f"{name}: values from {low:.3g} to {high:.3g} are outside [0, 1]")
    return tensor.clamp(0, 1)


def _pair(image: Image, reference: Image) -> tuple[Tensor, Tensor]:
    first, second = _image(image, "image"), _image(reference, "reference")
    if first.shape != second.shape:
        raise ValueError(f"image {tuple(first.shape)} and reference {tuple(second.shape)} differ in size")
    return first, second


def psnr(image: Image, reference: Image, mask: Tensor | None = None) -> float:
    """Peak signal-to-noise ratio in dB, `-10 log10(mean squared error)` for a peak of 1; `math.inf` if identical.

    Computed in float64 over all channels and pixels of two `[3, H, W]` images in [0, 1], or over the pixels of a mask
    (`[H, W]` bool) alone. Published evaluation scripts of this field subtract uint8 arrays; that difference wraps
    around modulo 256 (black against white then has an error of 1 instead of 255), so 8-bit input is refused here.
    """
    first, second = _pair(image, reference)
    squares = (first - second) ** 2
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape != first.shape[1:] or not bool(mask.any()):
            raise ValueError(
                f"mask: {mask.dtype} {tuple(mask.shape)}; give bool {tuple(first.shape[1:])} with a pixel that is True"
            )
        squares = squares[:, mask.cpu()]
    error = float(torch.mean(squares))
    return -10 * math.log10(error) if error > 0 else math.inf


def over_frames(metric: Callable[[Tensor, Tensor], float], image: Tensor, reference: Tensor) -> float:
    """A metric of two images `[3, H, W]`, or its mean over the frames of two clips `[F, 3, H, W]`.

    A frame that is identical to the reference's counts as a PSNR of 100 dB, unless all of them are.
    """
    if image.ndim == 3:
        return metric(image, reference)
    values = [metric(frame, other) for frame, other in zip(image, reference, strict=True)]
    if all(value == math.inf for value in values):
        return math.inf
    return math.fsum(min(value, PSNR_CEILING) for value in values) / len(values)


def temporal_error(clip: Tensor, reference: Tensor) -> float:
    """How wrong a clip moves: relative error (L2) of the differences between neighbouring frames; unitless.

    Args:
        clip, reference: `[F, 3, H, W]` of at least two frames.

    Returns:
        0 if both change alike; 1 for a still image in the place of a moving one; `math.inf` if only `clip` moves.
    """
    return relative_l2(clip.diff(dim=0), reference.diff(dim=0))


def ssim(image: Image, reference: Image) -> float:
    """Structural similarity (Wang et al., 2004), unitless, 1 for identical; two `[3, H, W]` images in [0, 1].

    The settings of the paper: Gaussian weights of sigma 1.5, population covariance; mean over the channels. The border
    that the window does not cover is left out, so the window shrinks to the image where that is under 11 pixels.
    """
    from skimage.metrics import structural_similarity

    first, second = _pair(image, reference)
    side = min(first.shape[1:])
    window = min(SSIM_WINDOW, side - (side + 1) % 2)
    value = structural_similarity(
        first.numpy(),
        second.numpy(),
        win_size=window,
        channel_axis=0,
        data_range=1.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    return float(value)


def flip(image: Image, reference: Image) -> float:
    """Mean LDR-FLIP error (Andersson et al., 2020), 0 for identical to 1; two `[3, H, W]` sRGB images in [0, 1].

    FLIP models the difference seen when two images are alternated on a screen and needs no learned weights. The
    viewing distance is its default, 67 pixels per degree: a 4K monitor 70 cm wide seen from 70 cm.
    """
    import flip_evaluator

    first, second = (pixels.permute(1, 2, 0).float().contiguous().numpy() for pixels in _pair(image, reference))
    _, mean, _ = flip_evaluator.evaluate(second, first, "LDR", inputsRGB=True, applyMagma=False)
    return float(mean)


def relative_l2(a: Tensor | npt.NDArray[Any], b: Tensor | npt.NDArray[Any]) -> float:
    """`||a - b|| / ||b||` over all elements of two arrays of one shape, in float64; unitless.

    0 if both are zero, `math.inf` if only `b` is.
    """
    first, second = (torch.as_tensor(value).detach().to("cpu", torch.float64) for value in (a, b))
    if first.shape != second.shape:
        raise ValueError(f"shapes {tuple(first.shape)} and {tuple(second.shape)} differ")
    error, norm = float(torch.linalg.vector_norm(first - second)), float(torch.linalg.vector_norm(second))
    if norm == 0:
        return math.inf if error > 0 else 0.0
    return error / norm


def _quantile(ordered: list[float], share: float) -> float:
    """Linear interpolation between order statistics that does not turn infinities into NaN."""
    position = share * (len(ordered) - 1)
    low, high = ordered[math.floor(position)], ordered[math.ceil(position)]
    return low if low == high else low + (position - math.floor(position)) * (high - low)


def summary_statistics(values: Iterable[float | None]) -> dict[str, float | int | None]:
    """Median, mean, 10th and 90th percentile of a metric over images, ready for JSON (no NaN, no infinity).

    - `median`, `p10`, `p90`: over all known values. Infinity (the PSNR of identical images) takes part as the largest
      value; a percentile that is itself infinite is `None`.
    - `mean`: over the finite values only, `None` if there are none.
    - `count`: known values; `infinite`: how many of them are infinite; `missing`: `None` and NaN, left out everywhere.
    """
    given = list(values)
    known = sorted(float(value) for value in given if value is not None and not math.isnan(value))
    finite = [value for value in known if math.isfinite(value)]
    summary: dict[str, float | int | None] = {
        "mean": math.fsum(finite) / len(finite) if finite else None,
        "count": len(known),
        "infinite": len(known) - len(finite),
        "missing": len(given) - len(known),
    }
    for name, share in (("median", 0.5), ("p10", 0.1), ("p90", 0.9)):
        value = _quantile(known, share) if known else math.inf
        summary[name] = value if math.isfinite(value) else None
    return summary


class Lpips:
    """Learned perceptual distance, shift-tolerant LPIPS on AlexNet (Ghildyal and Liu, 2022); unitless, 0 for identical.

    The distance follows LPIPS (Zhang et al., 2018): activations of five layers, scaled to unit length over the
    channels, squared differences weighted per channel by the learned heads, averaged over positions, summed over
    layers. The network is AlexNet made shift-tolerant: stride 1 in the first convolution, and every later stride is a
    reflect-padded binomial blur (Zhang, 2019). Numbers are not comparable with LPIPS on the unmodified AlexNet.

    The weights come with the package `stlpips-pytorch`, whose code is not imported (it requires torchvision). `device`
    is where the network runs.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        path = self._weights_path()
        if path is None:
            raise ModelError("The LPIPS weights are not installed. Install them with: pip install stlpips-pytorch")
        self._device = torch.device(device)
        state: dict[str, Tensor] = torch.load(path, map_location=self._device, weights_only=True)
        try:
            self._shift, self._scale = state["scaling_layer.shift"], state["scaling_layer.scale"]
            names = ("net.slice1.0", "net.slice2.5", "net.slice3.9", "net.slice4.11", "net.slice5.13")
            self._convolutions = [(state[f"{name}.weight"], state[f"{name}.bias"]) for name in names]
            self._blurs = [state[f"net.{name}.filt"] for name in ("slice1.1", "slice2.4", "slice3.8")]
            self._heads = [state[f"lin{layer}.model.1.weight"] for layer in range(5)]
        except KeyError as error:
            raise ModelError(
                f"{path}: no weight {error}; another version? Try: pip install stlpips-pytorch==0.0.2"
            ) from error

    @staticmethod
    def _weights_path() -> Path | None:
        spec = importlib.util.find_spec("stlpips_pytorch")  # finds the package without running it
        folders = (spec.submodule_search_locations or []) if spec is not None else []
        candidates = (Path(folder, *LPIPS_WEIGHTS) for folder in folders)
        return next((path for path in candidates if path.is_file()), None)

    @classmethod
    def available(cls) -> bool:
        """Whether the weights are installed."""
        return cls._weights_path() is not None

    @torch.inference_mode()
    def __call__(self, image: Image, reference: Image) -> float:
        """The distance of two `[3, H, W]` images in [0, 1]; those under 64 pixels are first enlarged to 64."""
        batch = torch.stack(_pair(image, reference)).to(self._device, torch.float32)
        side = min(batch.shape[2:])
        if side < LPIPS_MIN_SIDE:
            size = [round(length * LPIPS_MIN_SIDE / side) for length in batch.shape[2:]]
            batch = F.interpolate(batch, size=size, mode="bilinear", align_corners=False, antialias=True)
        distance = 0.0
        for features, head in zip(self._features(batch * 2 - 1), self._heads, strict=True):
            unit = features / (features.norm(dim=1, keepdim=True) + 1e-10)
            difference = (unit[:1] - unit[1:]).square()
            distance += float(F.conv2d(difference, head).mean())
        return distance

    def _features(self, batch: Tensor) -> list[Tensor]:
        """The five activations of `[B, 3, H, W]` images in [-1, 1]."""
        first, second, third, fourth, fifth = self._convolutions
        x = F.conv2d((batch - self._shift) / self._scale, *first, padding=2)
        taps = [F.relu(_blur_half(x, self._blurs[0]))]
        for blur, convolution, padding in ((self._blurs[1], second, 2), (self._blurs[2], third, 1)):
            x = _blur_half(F.max_pool2d(taps[-1], kernel_size=3, stride=1), blur)
            taps.append(F.relu(F.conv2d(x, *convolution, padding=padding)))
        for convolution in (fourth, fifth):
            taps.append(F.relu(F.conv2d(taps[-1], *convolution, padding=1)))
        return taps


def _blur_half(x: Tensor, kernel: Tensor) -> Tensor:
    """Depthwise 3x3 blur at stride 2; the reflected margin of 2 is the one the weights were trained with."""
    return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), kernel, stride=2, groups=x.shape[1])


@cache
def lpips() -> Lpips:
    """The distance, with weights that are read once.

    Raises:
        ModelError: if the weights are not installed.
    """
    return Lpips()
