"""What the reports share: templates, images as text, and charts in colours that follow the page."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup
from matplotlib.figure import Figure

__all__ = ["SERIES", "STYLE", "Key", "data_uri", "line", "panel", "svg", "template"]

TEMPLATES = Path(__file__).parent / "templates"
PNG, WEBP, MP4 = b"\x89PNG\r\n", b"WEBP", b"ftyp"

# Charts are drawn in placeholder colours that become CSS variables, so that one drawing serves light and dark pages.
INK, RULE = "#010101", "#020202"
SERIES = [f"#0401{number:02x}" for number in range(8)]
DASHES: list[Any] = ["-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (9, 3)), (0, (3, 3))]
CSS = {INK: "var(--ink)", RULE: "var(--rule)"} | {colour: f"var(--s{i})" for i, colour in enumerate(SERIES)}
STYLE: Any = {
    "axes.edgecolor": RULE,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 11,
    "grid.color": RULE,
    "svg.fonttype": "none",  # text stays text and takes the font of the page
    "svg.hashsalt": "hasten",
    "text.color": INK,
    "text.parse_math": False,  # a name with two dollar signs is not a formula
    "xtick.color": INK,
    "ytick.color": INK,
}


def template(name: str) -> Template:
    """A page's template; everything that goes into it is escaped."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(name)


def data_uri(folder: Path, name: str) -> str | None:
    """An image or a video of the result's folder as a data URI, or None if there is none of that name."""
    path = (folder / name).resolve()
    # A result may come from somebody else: nothing outside its folder, and nothing but images, goes into the page.
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        return None
    content = path.read_bytes()
    kinds = {
        "image/png": content.startswith(PNG),
        "image/webp": content[8:12] == WEBP,
        "video/mp4": content[4:8] == MP4,
    }
    kind = next((name for name, fits in kinds.items() if fits), None)
    return kind and f"data:{kind};base64,{base64.b64encode(content).decode()}"


def svg(figure: Figure, label: str) -> Markup:
    """The drawing as a tag for a page that has the colours `--ink`, `--rule`, `--s0`, `--s1`, ..."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None, "Creator": None}
    )
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for colour, variable in CSS.items():
        text = text.replace(colour, variable)
    text = re.sub(r'<g id="(line-\d+)">', r'<g class="\1">', text)  # the same line is in several charts
    # The page scales the drawing, but never beyond the size at which its text is as large as the page's.
    width = 96 * figure.get_figwidth()
    head = f'<svg role="img" aria-label="{Markup.escape(label)}" style="max-width: {width:.0f}px"'
    return Markup(re.sub(r'<svg [^>]*?(viewBox="[^"]+")[^>]*>', rf"{head} \1>", text, count=1))


def panel() -> tuple[Figure, Any]:
    """A figure of one pair of axes; charts of a page stand side by side, or one below the other on a phone."""
    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    return figure, figure.add_subplot()


@dataclass(frozen=True)
class Key:
    """How a line of the charts is drawn, the same one in all of them.

    Attributes:
        name: of the arm.
        number: its place in the legend; the class of its lines in the page is `line-NUMBER`.
    """

    name: str
    number: int

    @property
    def colour(self) -> str:
        """A placeholder of `SERIES`."""
        return SERIES[self.number % len(SERIES)]

    @property
    def dash(self) -> Any:
        """One dash for each turn of the colours, so that no two lines look the same."""
        return DASHES[self.number // len(SERIES) % len(DASHES)]

    @property
    def sample(self) -> Markup:
        """The line in the legend."""
        pattern = "" if self.dash == "-" else " ".join(str(length) for length in self.dash[1])
        variable = f"var(--s{self.number % len(SERIES)})"
        return Markup(
            '<svg class="sample" viewBox="0 0 26 8" aria-hidden="true">'
            '<line x1="0" x2="26" y1="4" y2="4" stroke-width="2.4" '
            'stroke="{}" stroke-dasharray="{}"/></svg>'
        ).format(variable, pattern)


def line(axes: Any, xs: Sequence[float], ys: Sequence[float], key: Key, marker: str = "") -> None:
    """A line of a chart, in the colour and dash of its key."""
    axes.plot(xs, ys, color=key.colour, linestyle=key.dash, marker=marker, markersize=4, gid=f"line-{key.number}")
