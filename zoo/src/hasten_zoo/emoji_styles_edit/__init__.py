"""`emoji-styles-edit`: FLUX.1-Kontext in small, in the latent space of `emoji-styles`: edits images at 128x128."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hasten_zoo.emoji_styles import HERE as STYLES_HERE
from hasten_zoo.emoji_styles import WEIGHTS as STYLES

if TYPE_CHECKING:
    from hasten.bench.subject import Edit, Subject

__all__ = ["CALL", "is_done", "load_emoji_styles_edit"]

HERE = Path(__file__).parent
WEIGHTS = HERE / "weights"
EDITS = HERE / "edits.safetensors"
# What FluxKontextPipeline has to be told to stay at 128 x 128 pixels, apart from prompt and image.
CALL: dict[str, Any] = {
    "height": 128,
    "width": 128,
    "max_area": 128 * 128,
    "_auto_resize": False,
    "num_inference_steps": 50,
    "max_sequence_length": 16,
}
KEPT = 0.01  # mean squared error to the source outside the mask, 20 dB
CHANGED = 0.25  # error to the target under the mask, as a share of the source's


def is_done(edit: Edit, image: Tensor) -> bool:
    """Whether an image `[3, 128, 128]` in [0, 1] is what the instruction asked for.

    It is if the rest of the image is kept (20 dB to the source), and if under the edit's mask the mean squared error to
    the target is less than a quarter of the source's, and less than that of a patch of the target's mean colour. The
    latter is not asked where the target is as good as one colour itself (such a patch is 20 dB from it or nearer), as
    where an object was removed.
    """
    to_target, to_source = ((image.float().cpu() - other).square().mean(0) for other in (edit.target, edit.source))
    outside, inside = to_source[~edit.mask], edit.target[:, edit.mask]
    patch = float((inside - inside.mean(1, keepdim=True)).square().mean())
    bar = CHANGED * float((edit.source[:, edit.mask] - inside).square().mean())
    if patch > KEPT:
        bar = min(bar, patch)
    kept = not len(outside) or float(outside.mean()) < KEPT
    return kept and float(to_target[edit.mask].mean()) < bar


def load_emoji_styles_edit(weights: Path = WEIGHTS, edits: Path = EDITS, styles: Path = STYLES) -> Subject:
    """The trained pipeline with its held-out edits; `weights` may be a folder written by the script's `--export`.

    The folder `styles` has the weights of `emoji-styles` that it differs from.

    Raises:
        ModelError: if the files are missing or damaged, or were trained from others than those in `styles`; or if an
            edit is of a pair that is not taught, or not held out.
    """
    # Imported here, so that training does not load the bench.
    from hasten.bench.subject import Subject
    from hasten.errors import ConfigError

    from hasten_zoo.emoji_styles.judge import read_judge
    from hasten_zoo.emoji_styles_edit.edits import read_edits
    from hasten_zoo.emoji_styles_edit.model import load_pipeline

    pipe = load_pipeline(weights, styles)
    known = {edit.prompt: edit for edit in read_edits(edits, pipe.vae, read_judge(STYLES_HERE)[0])}

    def grade(images: Tensor, prompts: list[str]) -> list[bool]:
        missing = [prompt for prompt in prompts if prompt not in known]
        if missing:
            raise ConfigError(f"no held-out edit has the prompt {missing[0]!r}; use the prompts of the model's edits")
        return [is_done(known[prompt], image) for prompt, image in zip(prompts, images, strict=True)]

    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [list(known.values())[i] for i in order]
    return Subject(
        name="emoji-styles-edit",
        pipe=pipe,
        prompts=[edit.prompt for edit in chosen],
        call=dict(CALL),
        grade=grade,
        edits=chosen,
        sizes=((128, 128),),
        about="FLUX.1-Kontext in small, in a latent space: style, background, objects",
    )
