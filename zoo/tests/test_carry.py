"""The images that are taught, in one file: the same over there, and no others."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hasten.errors import ModelError

from hasten_zoo.emoji_styles import carry
from hasten_zoo.emoji_styles.augment import plain_views, render
from hasten_zoo.emoji_styles.data import SIZES, Pair, load_emoji_styles_data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pairs that are taught (one held out), one that edits add, and one that is neither."""
    named = (
        ("red apple", "Food & Drink"),
        ("lone ghost", "Smileys"),
        ("cat face", "Animals & Nature"),
        ("key", "Objects"),
    )
    pairs = [Pair("noto", concept, category, True, concept == "cat face") for concept, category in named]
    random = np.random.default_rng(0)
    out = tmp_path / "data"
    out.mkdir()
    large = random.integers(0, 255, (len(pairs), 384, 384, 4), dtype=np.uint8)
    large[0, ..., 3] = 255  # opaque
    large[..., :3] = np.minimum(large[..., :3], large[..., 3:])  # premultiplied
    for size in SIZES:
        k = 384 // size
        boxed = large.reshape(len(pairs), size, k, size, k, 4).mean((2, 4))
        np.save(out / f"images-{size}.npy", boxed.round().astype(np.uint8))
    (out / "index.json").write_text(json.dumps({"sources": {}, "pairs": [asdict(pair) for pair in pairs]}))
    return out


def test_what_is_taught_arrives_as_it_was_under_its_own_numbers(folder: Path, tmp_path: Path) -> None:
    carry.main(["--pack", str(tmp_path / "taught.zip"), "--data", str(folder)])
    carry.main(["--unpack", str(tmp_path / "taught.zip"), "--data", str(tmp_path / "there")])
    here, there = load_emoji_styles_data(folder), load_emoji_styles_data(tmp_path / "there")
    assert there.pairs == here.pairs
    rows = [0, 2, 3]
    for size in (192, 128):
        assert np.array_equal(there.images[size][rows], here.images[size][rows])
    assert np.abs(there.images[64][rows].astype(int) - here.images[64][rows].astype(int)).max() <= 1
    views = plain_views(2)
    assert torch.equal(render(there, torch.tensor([3, 0]), views, 128), render(here, torch.tensor([3, 0]), views, 128))


def test_an_image_that_was_left_behind_is_refused(folder: Path, tmp_path: Path) -> None:
    assert carry.pack(folder, tmp_path / "taught.zip") == carry.unpack(tmp_path / "taught.zip", tmp_path / "there") == 3
    there = load_emoji_styles_data(tmp_path / "there")
    with pytest.raises(ModelError, match="1 of the images asked for were not carried"):
        render(there, torch.tensor([0, 1]), plain_views(2), 128)


def test_all_images_are_not_replaced_by_some(folder: Path, tmp_path: Path) -> None:
    carry.pack(folder, tmp_path / "taught.zip")
    with pytest.raises(ModelError, match="has the images of all pairs"):
        carry.unpack(tmp_path / "taught.zip", folder)
    carry.unpack(tmp_path / "taught.zip", tmp_path / "there")
    assert carry.unpack(tmp_path / "taught.zip", tmp_path / "there") == 3  # what was carried may be carried again


@pytest.mark.parametrize(("content", "says"), [(b"no zip", "not a file that --pack wrote"), (None, "there is no file")])
def test_another_file_is_refused(tmp_path: Path, content: bytes | None, says: str) -> None:
    file = tmp_path / "taught.zip"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ModelError, match=says):
        carry.unpack(file, tmp_path / "there")
    assert not (tmp_path / "there").exists()
