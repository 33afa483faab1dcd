"""`emoji-styles-edit`: FLUX.1-Kontext in small, in the latent space of `emoji-styles`: edits images at 128x128."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
WEIGHTS = HERE / "weights"
