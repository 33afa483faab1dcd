"""Images for the pages of resolution and streaming methods.

    python benchmarks/pictures.py specedit out/emoji-kontext.json
    python benchmarks/pictures.py fresco out/emoji-flux-resolution.json
    python benchmarks/pictures.py dvg
    python benchmarks/pictures.py streaming

The JSON and its folder of images are those of `hasten bench` on the page's model; `dvg` draws its clips and `streaming`
rolls out one world by itself. Each writes `docs/images/PAGE.png`, or what `--out` says.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from arms import arm_of
from hasten.bench import subject
from hasten.bench.result import Result, read_result
from hasten.bench.sampling import draw_sample
from hasten.bench.sheet import contact_sheet, film_strip, to_pil
from hasten.bench.streams import parse_streaming
from hasten.errors import ReportError
from hasten.io import write_atomically
from hasten.streaming import FullHistory
from hasten_zoo.command import told
from hasten_zoo.emoji_flux.data import load_emoji_set
from hasten_zoo.sprites_wan import load_sprites_wan
from PIL import Image

IMAGES = Path(__file__).parent.parent / "docs" / "images"


@dataclass(frozen=True)
class Page:
    """What one sheet shows.

    Attributes:
        arms: heading of each column by the id of a row of the JSON; `|` breaks a line.
        captions: how many rows.
        side: height of an image, pixels.
        edits: whether source and target come first.
        truth: whether the image that the caption had in training comes first.
    """

    arms: dict[str, str]
    captions: int = 8
    side: int = 96
    edits: bool = False
    truth: bool = False


PAGES = {
    "specedit": Page(
        {
            "euler-50": "plain|50 steps",
            "euler-10": "plain|10 steps",
            "specedit:discrepancy=latent-20": "specedit|8 + 10 + 2",
            "specedit:discrepancy=latent:draft=6:mixed=4:final=0:coverage=3-10": "specedit|6 + 4 + 0",
            "bottleneck:stages=9/9-18": "bottleneck|9 + 9",
            "ralu:preset=18-18": "ralu|18",
        },
        edits=True,
    ),
    "fresco": Page(
        {
            "euler-50": "plain|50 steps",
            "euler-18": "plain|18 steps",
            "fresco:stages=6/2/10:shares=0.3-18": "fresco|6 + 2 + 10",
            "fresco:preset=18-18": "fresco|6 + 6 + 6",
            "fresco:preset=18+foca:interval=2:warmup=1-18": "fresco + foca|9 computed",
            "fresco:preset=9-9": "fresco|3 + 3 + 3",
            "bottleneck:stages=9/9-18": "bottleneck|9 + 9",
            "ralu:preset=18-18": "ralu|18",
        },
        truth=True,
    ),
}
CLIPS = {  # of resolution_video.py
    "euler@50": "plain|50 steps",
    "euler@26": "plain|26 steps",
    "dvg:budget=0.52:lead=1": "dvg|half of the pixels and frames",
    "dvg:budget=0.52:compress=space": "dvg|half of the pixels",
    "dvg:budget=0.575:compress=time": "dvg|half of the frames",
}
STREAMING = {
    "full-history": "full history",
    "focused-forcing:budget=6": "focused-forcing",
    "topk-attention:k=6": "topk-attention",
    "sliding-window:window=5": "sliding-window",
    "dummy-forcing:local=1:history=10": "dummy-forcing",
}
FRAMES, SHOWN, SEED = 48, 16, 4
DRAWN = 6  # clips


def no_images(prompt: str, i: int) -> list[Path]:
    """Images beside those of the result: none."""
    return []


def bench_page(page: Page, result_file: Path) -> Image.Image:
    """A sheet of some arms of a bench result.

    Raises:
        ReportError: if the file is no such result, or lacks an arm or images.
    """
    result = read_result(result_file)
    if not isinstance(result, Result):
        raise ReportError(f"{result_file}: a result of a streaming model, and the page shows images")
    wanted = "emoji-kontext" if page.edits else "emoji-flux"
    if result.model != wanted:
        raise ReportError(f"{result_file}: a result of {result.model}, and the page shows {wanted}")
    images = {row.id: row.images for row in result.measured} | {"euler-50": result.baseline.images}
    prompts = result.settings.prompts[: page.captions]
    for arm in page.arms:
        if len(images.get(arm) or ()) < len(prompts):
            raise ReportError(f"{result_file} has no images of {arm}, which the page shows; measure it with the others")
    with ExitStack() as stack:
        own: Callable[[str, int], list[Path]] = no_images
        headings = list(page.arms.values())
        if page.edits:
            own = edit_images(Path(stack.enter_context(tempfile.TemporaryDirectory())))
            headings = ["source", "target", *headings]
        if page.truth:
            own = training_images(Path(stack.enter_context(tempfile.TemporaryDirectory())))
            headings = ["caption's|image", *headings]
        lines = [
            [*own(prompt, i), *(result_file.parent / images[arm][i] for arm in page.arms)]
            for i, prompt in enumerate(prompts)
        ]
        return contact_sheet(lines, prompts, headings, side=page.side)


def edit_images(folder: Path) -> Callable[[str, int], list[Path]]:
    """From a prompt and its number to files of the edit's source and target, written to a folder."""
    edits = {edit.prompt: edit for edit in subject.load("emoji-kontext").edits}

    def written(prompt: str, i: int) -> list[Path]:
        paths = [folder / f"{i}-{name}.png" for name in ("source", "target")]
        for path, image in zip(paths, (edits[prompt].source, edits[prompt].target), strict=True):
            to_pil(image).save(path)
        return paths

    return written


def training_images(folder: Path) -> Callable[[str, int], list[Path]]:
    """From a caption of emoji-flux and its number to a file of its image, written to a folder."""
    known = load_emoji_set()

    def written(prompt: str, i: int) -> list[Path]:
        path = folder / f"{i}.png"
        to_pil(known.at(64)[known.captions.index(prompt)]).save(path)
        return [path]

    return written


def clips_page() -> Image.Image:
    """Clips of captions that training left out, clip `i` from seed `i`: a few frames of each arm."""
    model = load_sprites_wan()
    model.pipe.set_progress_bar_config(disable=True)
    prompts = model.prompts[:DRAWN]  # the held-out ones come first
    with tempfile.TemporaryDirectory() as folder:
        lines = []
        for seed, prompt in enumerate(prompts):
            paths = [Path(folder) / f"{seed}-{i}.png" for i in range(len(CLIPS))]
            for text, path in zip(CLIPS, paths, strict=True):
                film_strip(draw_sample(model, *arm_of(text), prompt, seed, {}).image).save(path)
            lines.append(paths)
        return contact_sheet(lines, prompts, list(CLIPS.values()), side=64)


def streaming_page() -> Image.Image:
    """One world as every method rolls it out, a row each."""
    roll = subject.load_streaming("sprites-stream").rollout(FRAMES, 8)
    with tempfile.TemporaryDirectory() as folder:
        lines = []
        for text in STREAMING:
            method = FullHistory() if text == "full-history" else parse_streaming(text)
            path = Path(folder) / f"{len(lines)}.png"
            film_strip(roll(method, SEED).video[0], SHOWN).save(path)
            lines.append([path])
        every = FRAMES / SHOWN
        heading = f"one frame in {every:g}; who the two are is told in the first half only"
        return contact_sheet(lines, list(STREAMING.values()), [heading], side=72)


DRAWING = {"dvg": clips_page, "streaming": streaming_page}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", choices=[*PAGES, *DRAWING])
    parser.add_argument("result", type=Path, nargs="?", help=f"JSON of hasten bench; none for {' and '.join(DRAWING)}")
    parser.add_argument("--out", type=Path, help="docs/images/PAGE.png by default")
    args = parser.parse_args(arguments)
    if args.page in PAGES and args.result is None:
        parser.error(f"{args.page} needs the JSON of a bench run")
    if args.page in DRAWING and args.result is not None:
        parser.error(f"{args.page} draws its own images, and takes no JSON")
    sheet = DRAWING[args.page]() if args.page in DRAWING else bench_page(PAGES[args.page], args.result)
    write_atomically(args.out or IMAGES / f"{args.page}.png", partial(sheet.save, format="png", optimize=True))


if __name__ == "__main__":
    told(main)
