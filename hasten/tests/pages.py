"""What the pages are made of: headings, links, commands and blocks of code."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
OTHERS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "hasten/README.md", "zoo/README.md")
FENCE = re.compile(
    r"(?P<mark><!-- not run: [^>]+ -->\n+)?^(?P<indent> *)```(?P<kind>\w+)\n(?P<code>.*?)^ *```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A block of code of a page; `run` is false where the page says why it cannot run anywhere."""

    kind: str
    code: str
    run: bool


def pages() -> list[Path]:
    """The pages of the site, and what is read on its own."""
    return [*(ROOT / name for name in OTHERS), *sorted(DOCS.rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The blocks of code of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(m["kind"], re.sub(rf"^{m['indent']}", "", m["code"], flags=re.MULTILINE), m["mark"] is None)
        for m in FENCE.finditer(text)
    ]


def without_code(text: str) -> str:
    """A page without its code, where brackets are no links and signs of numbers no headings."""
    return re.sub(
        r"^ *```.*?^ *```$|`[^`\n]*`",
        lambda match: "`" if match[0] == "`" else "",
        text,
        flags=re.DOTALL | re.MULTILINE,
    )


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub and MkDocs make them."""
    found: set[str] = set()
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#{1,6} +(.+?)\s*#*$", text, flags=re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading).lower()
        words = re.sub(r"[^\w\s-]", "", words)
        found |= {words.strip().replace(" ", "-"), re.sub(r"[\s-]+", "-", words.strip())}
    return found | set(re.findall(r'(?:id|name)="([^"]+)"', text))


def links(page: Path) -> list[str]:
    """Targets of the links and images of a page that are files of the repository."""
    text = without_code(page.read_text(encoding="utf-8"))
    found = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", text) + re.findall(
        r'(?:src|href|srcset)="([^"]+)"', text
    )
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def commands(text: str) -> list[list[str]]:
    """The `hasten` commands of a page: its lines of code that begin so, options on the next line included."""
    code = "\n".join(re.findall(r"^ *```(?:bash|sh|console)?\n(.*?)^ *```$", text, flags=re.DOTALL | re.MULTILINE))
    code += "\n" + "\n".join(re.findall(r"^ {4,}(hasten .*)$", text, flags=re.MULTILINE))
    joined = code.replace("\\\n", " ")
    lines = [line.strip().removeprefix("$ ").removeprefix(".venv/bin/") for line in joined.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if re.match(r"hasten [a-z-]", line)]
