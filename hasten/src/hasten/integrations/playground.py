"""A page to try settings on: the full and the fast image side by side, what differs, and the line of Python for it."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from PIL import Image
from torch import Tensor

import hasten
from hasten import registry
from hasten.bench.sampling import call_arguments
from hasten.bench.sheet import to_pil
from hasten.bench.subject import Subject
from hasten.caching.method import ScheduledMethod
from hasten.errors import ConfigError, HastenError
from hasten.parameters import Range, accepted
from hasten.pipeline.handle import Acceleration
from hasten.quality import metrics
from hasten.quality.tolerance import TIERS
from hasten.solvers import Leap

__all__ = ["Comparison", "Playground", "page"]

BUDGET, TOLERANCE = "a budget", "a tolerance"
GAIN = 8  # of the difference map
KEPT = 16  # full runs
MOST_SEED = 2**31
DEFAULT_STEPS = 50  # of a model that does not say how many it is made for
# Small images are enlarged as they are.
# Images of few pixels are shown as they are; Gradio's colours of code are too pale to be read on white.
CSS = """
.drawn img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated; }
.cm-content span { color: var(--body-text-color) !important; }
"""


@dataclass(frozen=True)
class Comparison:
    """Both images and what is to be said of them.

    Attributes:
        full: of the full run.
        fast: of the setting.
        difference: mean over the channels of their absolute difference, `GAIN` times, white where it is largest.
        figures: Markdown.
        code: that accelerates the pipeline so.
    """

    full: Image.Image
    fast: Image.Image
    difference: Image.Image
    figures: str
    code: str


class Playground:
    """Draws with a model in full and fast, one request at a time; full images are kept for the next setting.

    Args:
        model: that draws images.

    Raises:
        ConfigError: for one that makes something else.
    """

    def __init__(self, model: Subject) -> None:
        if model.kind != "images":
            raise ConfigError(f"the playground draws images, and {model.name} makes {model.kind}; give another --model")
        self.model = model
        self.steps = int(model.call.get("num_inference_steps", DEFAULT_STEPS))
        self._known: OrderedDict[tuple[str, int], tuple[Tensor, float]] = OrderedDict()
        self._lock = threading.Lock()
        self._draw("", 0, num_inference_steps=2)  # what the first call does once is not to count

    @property
    def methods(self) -> list[str]:
        """Methods that the model can have without further files; LEAP first where it is fitted."""
        names = [
            info.name
            for info in registry.methods()
            if issubclass(info.config, ScheduledMethod) and not info.needs_calibration
        ]
        return [*(["leap"] if "leap" in self.model.fitted else []), *names]

    def compare(self, prompt: str, seed: int, by: str, tier: str, method: str, computed_steps: int) -> Comparison:
        """Draw in full and fast from the same noise.

        Args:
            prompt: what to draw.
            seed: of the noise.
            by: `BUDGET` or `TOLERANCE`.
            tier: the certified quality, for a tolerance.
            method: for a budget.
            computed_steps: for a budget.

        Raises:
            HastenError: for a setting that cannot be had, with the reason.
        """
        if not prompt.strip():
            raise ConfigError("write what to draw")
        seed = accepted("playground", "seed", Annotated[int, Range(0, MOST_SEED)], seed)
        if by == BUDGET:
            self._check_count(computed_steps)
        with self._lock:
            if (prompt, seed) not in self._known:
                self._known[prompt, seed] = self._draw(prompt, seed)
            self._known.move_to_end((prompt, seed))
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
            full, full_seconds = self._known[prompt, seed]
            steps: dict[str, int] = {}
            if by == TOLERANCE:
                run, code = hasten.accelerate(self.model.pipe, quality=tier), f"quality={tier!r}"
            else:
                run, code, steps = self._budget(method, computed_steps)
            with run:
                fast, seconds = self._draw(prompt, seed, **steps)
                summary = run.summary()
        rows = [
            ("seconds", f"{full_seconds:.2f}", f"{seconds:.2f} (**{full_seconds / seconds:.1f}x** faster)"),
            ("computed steps", f"{self.steps}", f"{summary.computed_steps} ({summary.method})"),
            ("PSNR", "", "identical" if torch.equal(fast, full) else f"{metrics.psnr(fast, full):.1f} dB"),
        ]
        if metrics.Lpips.available():
            rows.append(("LPIPS", "", f"{metrics.lpips()(fast, full):.4f}"))
        lines = ["| | full run | fast |", "|---|--:|--:|", *(f"| {' | '.join(row)} |" for row in rows)]
        difference = (GAIN * (fast - full).abs().mean(0)).clamp(0, 1).expand(3, -1, -1)
        call = "".join(f", {name}={value!r}" for name, value in (self.model.call | steps).items())
        return Comparison(
            full=to_pil(full),
            fast=to_pil(fast),
            difference=to_pil(difference),
            figures="\n".join(lines),
            code=f"run = hasten.accelerate(pipe, {code})\nnoise = torch.Generator().manual_seed({seed})\n"
            f"image = pipe({prompt!r}{call}, generator=noise).images[0]",
        )

    def _check_count(self, computed_steps: int) -> None:
        if computed_steps not in Range(1, self.steps):
            raise ConfigError(
                f"{self.model.name} has {self.steps} steps; compute 1 to {self.steps}, not {computed_steps}"
            )

    def _budget(self, method: str, computed_steps: int) -> tuple[Acceleration, str, dict[str, int]]:
        """The accelerated pipeline, the arguments that made it so, and what its calls take besides."""
        if method == "leap":
            file = str(self.model.fitted["leap"])
            run = hasten.accelerate(self.model.pipe, Leap(file))
            return run, f"hasten.Leap({file!r})", {"num_inference_steps": computed_steps}
        params: dict[str, Any] = {"schedule": "even", "computed_steps": computed_steps}
        run = hasten.accelerate(self.model.pipe, method, **params)
        return run, f"{method!r}, schedule='even', computed_steps={computed_steps}", {}

    @torch.no_grad()
    def _draw(self, prompt: str, seed: int, **changes: Any) -> tuple[Tensor, float]:
        """An image `[3, H, W]` in [0, 1] on the CPU, and the seconds that it took."""
        arguments = call_arguments(self.model, [prompt], {}) | {"output_type": "pt"} | changes
        generator = torch.Generator("cpu").manual_seed(seed)
        start = time.perf_counter()
        image = self.model.pipe(prompt=prompt, generator=generator, **arguments).images[0].float().cpu()
        return image, time.perf_counter() - start


def page(playground: Playground) -> Any:
    """The page, as Gradio's `Blocks`; launch it with `css=CSS`.

    Raises:
        ConfigError: if Gradio is not installed.
    """
    try:
        import gradio
    except ImportError:
        raise ConfigError("the playground needs Gradio, which is not installed: pip install gradio") from None
    model = playground.model

    def draw(*values: Any) -> tuple[Any, ...]:
        try:
            found = playground.compare(*values)
        except HastenError as error:
            return f"**This cannot be drawn**: {error}", None, None, None, "", ""
        return "", found.full, found.fast, found.difference, found.figures, found.code

    with gradio.Blocks(title=f"hasten: {model.name}", analytics_enabled=False) as blocks:
        gradio.Markdown(f"# {model.name}\n{model.about}. What does a fast setting cost in quality?")
        with gradio.Row():
            prompt = gradio.Textbox(model.prompts[0], label="Prompt", scale=3, min_width=240)
            seed = gradio.Number(0, label="Seed", precision=0, minimum=0, maximum=MOST_SEED, min_width=100)
        with gradio.Row():
            by = gradio.Radio([BUDGET, TOLERANCE], value=BUDGET, label="What is given", min_width=240)
            tier = gradio.Dropdown(list(TIERS), value="high", label="Certified quality", visible=False)
            method = gradio.Dropdown(playground.methods, value=playground.methods[0], label="Method")
            count = gradio.Slider(
                1, playground.steps, value=9, step=1, label=f"Computed steps of {playground.steps}", min_width=240
            )
        button = gradio.Button("Draw", variant="primary")
        problem = gradio.Markdown()
        with gradio.Row(equal_height=True):
            titles = ("Full run", "Fast", f"Difference, {GAIN} times")
            shown = [
                gradio.Image(
                    label=title,
                    alt_text=title,
                    type="pil",
                    format="png",
                    height=280,
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    elem_classes="drawn",
                )
                for title in titles
            ]
        with gradio.Row():
            with gradio.Column(min_width=320):
                figures = gradio.Markdown()
            with gradio.Column(min_width=320):
                code = gradio.Code(language="python", label="Python", lines=2, interactive=False, wrap_lines=True)

        def switched(value: str) -> list[Any]:
            budget = value == BUDGET
            return [gradio.update(visible=not budget), gradio.update(visible=budget), gradio.update(visible=budget)]

        by.change(switched, by, [tier, method, count], show_progress="hidden")
        inputs = [prompt, seed, by, tier, method, count]
        for event in (button.click, prompt.submit):
            event(draw, inputs, [problem, *shown, figures, code], concurrency_limit=1, concurrency_id="draw")
    return blocks
