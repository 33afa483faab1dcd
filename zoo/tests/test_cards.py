"""What the cards of the models tell people to write is run as it stands, with few steps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import hasten_zoo

CARDS = sorted(Path(hasten_zoo.__file__).parent.glob("*/README.md"))
QUICK = {"**model.call)": "**model.call | {'num_inference_steps': 2})", "frames=48": "frames=6"}


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.parent.name)
def test_the_code_of_a_card_runs(card):
    blocks = re.findall(r"```python\n(.*?)```", card.read_text(encoding="utf-8"), flags=re.DOTALL)
    scope = {}
    for block in blocks:
        for usual, quick in QUICK.items():
            block = block.replace(usual, quick)
        exec(block, scope)
    drawn = [value for name, value in scope.items() if name in ("image", "video", "again", "drawn")]
    assert bool(drawn) == bool(blocks)
    assert all(torch.isfinite(value).all() for value in drawn if isinstance(value, torch.Tensor))


def test_no_weights_say_where_on_a_disk_they_were_read_from() -> None:
    configs = sorted(Path(hasten_zoo.__file__).parent.glob("*/weights/**/*.json"))
    assert len(configs) > 20
    for config in configs:
        assert '"_name_or_path": "/' not in config.read_text(encoding="utf-8"), config
