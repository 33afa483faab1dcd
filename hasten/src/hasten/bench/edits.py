"""Editing: which image goes into a call, and how much of the rest of it an edit left alone."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.flux.pipeline_flux_kontext import retrieve_latents
from PIL import Image
from torch import Tensor
from torch.nn import functional

from hasten.bench.subject import Edit, Subject
from hasten.errors import ConfigError
from hasten.io import describe
from hasten.quality.metrics import PSNR_CEILING, psnr

__all__ = ["at_size", "edit_figures", "edit_of", "source_arguments", "vae_unedited", "with_image"]

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # some others are read by running another program


def with_image(model: Subject, file: Path | None) -> Subject:
    """The model with an image of the user's own as the source of every edit; the model as it is without one.

    Raises:
        ConfigError: if the pipeline takes no image, or the file is none.
    """
    if file is None:
        return model
    if "image" not in inspect.signature(type(model.pipe).__call__).parameters:
        raise ConfigError(
            f"{type(model.pipe).__name__} makes images from text alone and takes no source image; "
            "leave --image out, or name an editing model with --model"
        )
    least = 2 * int(getattr(model.pipe, "vae_scale_factor", 8))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                source = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = describe(error)
        raise ConfigError(f"{file} cannot be read as an image ({reason}); give a PNG or JPEG with --image") from error
    if min(source.size) < least:
        raise ConfigError(f"{file} has {source.width}x{source.height} pixels; give one of at least {least}x{least}")
    # What the right answer would be is not known of an image of one's own.
    return replace(model, call=model.call | {"image": source}, edits=[], grade=None)


def edit_of(model: Subject, prompt: str) -> Edit | None:
    """The edit that a prompt asks for; None if the model has none, which is then told what to edit in its call.

    Raises:
        ConfigError: for a prompt that is none of the model's edits, since there is no image to go with it.
    """
    if not model.edits:
        return None
    found = next((edit for edit in model.edits if edit.prompt == prompt), None)
    if found is None:
        raise ConfigError(
            f"{model.name} edits images, and there is none for the prompt {prompt!r}; "
            "use the model's own prompts, or an image of your own with hasten bench --image"
        )
    return found


def at_size(edit: Edit, height: int, width: int) -> Edit:
    """The edit with its images averaged down to another size; a pixel of the mask is set if any in it was."""
    if edit.source.shape[1:] == (height, width):
        return edit
    size = (height, width)
    source, target = (functional.adaptive_avg_pool2d(image, size) for image in (edit.source, edit.target))
    mask = functional.adaptive_max_pool2d(edit.mask[None].float(), size)[0] > 0
    return replace(edit, source=source, target=target, mask=mask)


def source_arguments(model: Subject, prompts: Sequence[str], arguments: dict[str, Any]) -> dict[str, Any]:
    """What the pipeline is told beside the prompts: the sources `[B, 3, H, W]` in [0, 1]; nothing without edits.

    Args:
        model: with its edits.
        prompts: of one call.
        arguments: of the call; its height and width are those of the sources.
    """
    edits = [edit for prompt in prompts if (edit := edit_of(model, prompt)) is not None]
    if not edits:
        return {}
    height, width = (arguments.get(name) or edits[0].source.shape[i] for i, name in ((1, "height"), (2, "width")))
    return {"image": torch.stack([at_size(edit, height, width).source for edit in edits])}


def edit_figures(model: Subject, prompt: str, image: Tensor) -> dict[str, float | None]:
    """How well an edit was done: PSNR in dB of an image `[3, H, W]` in [0, 1]; nothing if the model has no edits.

    Returns:
        `psnr_unedited`: outside the edit mask, against the source; None where the mask covers everything.
        `psnr_edited`: under the mask, against the known target.
    """
    edit = edit_of(model, prompt)
    if edit is None:
        return {}
    edit = at_size(edit, *image.shape[1:])
    return {
        "psnr_unedited": _unedited(edit, image),
        "psnr_edited": psnr(image, edit.target, edit.mask) if bool(edit.mask.any()) else None,
    }


def _unedited(edit: Edit, image: Tensor) -> float | None:
    outside = ~edit.mask
    return psnr(image, edit.source, outside) if bool(outside.any()) else None


@torch.no_grad()
def vae_unedited(model: Subject, prompts: Sequence[str], size: tuple[int, int]) -> list[float | None]:
    """`psnr_unedited` of the sources after the way through the VAE and back: what no edit can do better than.

    A lossless VAE has 100 dB.
    """
    figures: list[float | None] = []
    for prompt in prompts:
        edit = edit_of(model, prompt)
        if edit is not None:
            edit = at_size(edit, *size)
            found = _unedited(edit, _round_trip(model.pipe.vae, edit.source))
            figures.append(None if found is None else min(found, PSNR_CEILING))
    return figures


def _round_trip(vae: Any, image: Tensor) -> Tensor:
    """An image `[3, H, W]` in [0, 1] encoded (without sampling) and decoded."""
    weight = next(iter(vae.state_dict().values()))
    latents = retrieve_latents(vae.encode(2 * image[None].to(weight) - 1), sample_mode="argmax")
    decoded: Tensor = vae.decode(latents, return_dict=False)[0][0]
    return (decoded.float().cpu() / 2 + 0.5).clamp(0, 1)
