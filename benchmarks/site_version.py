"""A hook of MkDocs: the version that the pages describe, in the header and in the foot of each of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1] / "hasten" / "src" / "hasten" / "__init__.py"


def version() -> str:
    """The version of the package beside these pages, which need not be the one that is installed."""
    found = re.search(r'^__version__ = "([^"]+)"$', PACKAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert found, f"{PACKAGE} has no version"
    return found[1]


def on_config(config: Any) -> Any:
    """Called by MkDocs with the settings of `mkdocs.yml`."""
    config["site_name"] = f"{config['site_name']} {version()}"
    config["copyright"] = f"hasten {version()}, Apache-2.0"
    return config
