"""`emoji-styles-edit`: scenes and instructions, what training draws, and that it asks for what the pipeline does."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline, FluxPipeline
from hasten.bench.subject import Edit
from hasten.errors import ConfigError, ModelError
from torch import nn

from hasten_zoo.emoji_styles import HERE as STYLES_HERE
from hasten_zoo.emoji_styles import WEIGHTS as STYLES_WEIGHTS
from hasten_zoo.emoji_styles import judge
from hasten_zoo.emoji_styles.augment import COLOURS, WHITE
from hasten_zoo.emoji_styles.data import EmojiStyles, Pair
from hasten_zoo.emoji_styles.model import build_pipeline as build_styles
from hasten_zoo.emoji_styles.model import build_tokenizer
from hasten_zoo.emoji_styles.model import load_pipeline as load_styles
from hasten_zoo.emoji_styles.train import export as export_styles
from hasten_zoo.emoji_styles.train import learning_parts
from hasten_zoo.emoji_styles.vae import EmojiVAE
from hasten_zoo.emoji_styles_edit import EDITS, evaluate, is_done, load_emoji_styles_edit, train
from hasten_zoo.emoji_styles_edit import data as edits_data
from hasten_zoo.emoji_styles_edit import model as edits_model
from hasten_zoo.emoji_styles_edit.data import CORNERS, ITEMS, SIZE, Scenes, draw_scenes, render_scenes, scene_texts
from hasten_zoo.emoji_styles_edit.edits import COUNTS, held_out_edits, read_edits, save_edits
from hasten_zoo.emoji_styles_edit.latents import STEP, SceneLatents, encode_scenes, load_scenes, save_scenes
from hasten_zoo.training import Settings, Training, read_checkpoint

STYLES = ["noto", "flat", "3d"]
CONCEPTS = ["lemon", "star", "fish", "cat face", "left arrow", "lone ghost"]


@pytest.fixture(scope="module")
def data() -> EmojiStyles:
    """Sixteen pairs; "flat, star" is held out and a ghost is known in one style. An image is a coloured rectangle."""
    pairs = [
        Pair(s, c, "Animals & Nature", "arrow" not in c, (s, c) == ("flat", "star"))
        for s in STYLES
        for c in CONCEPTS[:-1]
    ]
    pairs.append(Pair("noto", "lone ghost", "Animals & Nature", True, False))
    random = np.random.default_rng(0)
    stored = np.zeros((len(pairs), SIZE, SIZE, 4), np.uint8)
    for image in stored:
        top, left, far, bottom = *random.integers(10, 40, 2), *random.integers(80, 118, 2)
        image[top:bottom, left:far] = [*random.integers(0, 200, 3), 255]
    return EmojiStyles(pairs, {SIZE: stored})


@pytest.fixture(scope="module")
def scenes(data: EmojiStyles) -> Scenes:
    rows = data.rows(held_out=False).repeat(20)
    return draw_scenes(data.pairs, rows, torch.Generator().manual_seed(0))


@pytest.fixture
def styles_pipe() -> FluxPipeline:
    torch.manual_seed(0)
    vae = EmojiVAE(block_out_channels=(12, 48, 8, 8), blocks=(0, 0), decoder_blocks=(0, 0)).eval()
    pipe = build_styles(build_tokenizer(STYLES, CONCEPTS), vae, width=32, double=1, single=1)
    for name, module in pipe.transformer.named_modules():  # no output or gate is zero: everything tells
        if isinstance(module, nn.Linear) and (name.endswith("norm.linear") or ".norm1" in name or name == "proj_out"):
            nn.init.normal_(module.weight, std=0.3)
    return pipe


@pytest.fixture
def pipe(styles_pipe: FluxPipeline) -> FluxKontextPipeline:
    pipe = edits_model.build_pipeline(styles_pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _once(data: EmojiStyles) -> Scenes:
    return draw_scenes(data.pairs, data.rows(held_out=False), torch.Generator().manual_seed(1))


# --- scenes ---------------------------------------------------------------------------------------------------------


def test_nothing_of_a_held_out_pair_is_shown(data: EmojiStyles, scenes: Scenes) -> None:
    assert "flat, star" not in {f"{data.pairs[i].style}, {data.pairs[i].concept}" for i in scenes.rows.tolist()}
    pairs = zip(scenes.rows.tolist(), scenes.item.tolist(), strict=True)
    shown = {(data.pairs[i].style, ITEMS[k]) for i, k in pairs if k >= 0}
    assert shown == {(s, c) for s in STYLES for c in ("lemon", "star", "fish")} - {("flat", "star")}


def test_styles_of_a_concept_are_seen_alike_so_that_only_the_style_differs(data: EmojiStyles) -> None:
    scenes = _once(data)
    for concept in CONCEPTS:
        own = [k for k, i in enumerate(scenes.rows.tolist()) if data.pairs[i].concept == concept]
        for view in (scenes.views.mirrored, scenes.views.shift, scenes.views.colour):
            assert all(torch.equal(view[k], view[own[0]]) for k in own)
    mirrored = {data.pairs[i].concept for i in scenes.rows[scenes.views.mirrored].tolist()}
    assert mirrored
    assert "left arrow" not in mirrored


def test_an_object_changes_its_corner_and_nothing_else(data: EmojiStyles, scenes: Scenes) -> None:
    first, second, masks = render_scenes(data, scenes.part(slice(0, 60)))
    changed = (first - second).abs().amax(1) > 1e-6
    seen = set()
    for k in range(60):
        item, corner = int(scenes.item[k]), int(scenes.corner[k])
        if item < 0:
            assert not masks[k].any()
            assert scenes.colour[k] != scenes.views.colour[k]
            far = second[k][:, 0, 0]  # no image reaches there
            assert torch.allclose(far, torch.tensor(list(COLOURS.values())[int(scenes.colour[k])]) / 127.5 - 1)
        else:
            assert not (changed[k] & ~masks[k]).any()
            assert changed[k].any()
            rows, columns = masks[k].nonzero().float().mean(0) > SIZE / 2
            assert CORNERS[corner] == f"{'bottom' if rows else 'top'} {'right' if columns else 'left'}"
            seen.add(corner)
    assert seen == set(range(4))
    assert 0.45 < float((scenes.views.colour == WHITE).float().mean()) < 0.8


def test_instructions_name_what_they_lead_to(data: EmojiStyles, scenes: Scenes) -> None:
    there, back = scene_texts(scenes)
    names = list(COLOURS)
    for k, (to, fro) in enumerate(zip(there, back, strict=True)):
        if scenes.item[k] >= 0:
            assert to == f"add the {ITEMS[scenes.item[k]]} {CORNERS[scenes.corner[k]]}"
            assert fro == f"remove the {ITEMS[scenes.item[k]]}"
        else:
            assert to == f"make the background {names[scenes.colour[k]]}"
            assert fro == f"make the background {names[scenes.views.colour[k]]}"
    assert {*there, *back} <= set(edits_data.instructions(STYLES))


def test_scenes_come_back_from_disk_and_are_what_the_autoencoder_says(
    data: EmojiStyles, styles_pipe: FluxPipeline, tmp_path: Path
) -> None:
    scenes = _once(data)
    encoded = encode_scenes(styles_pipe.vae, data, scenes, batch=4)
    save_scenes(encoded, tmp_path)
    loaded = load_scenes(tmp_path)
    assert list(loaded.values) == [128, 64]
    assert vars(loaded) | {"values": 0} == vars(encoded) | {"values": 0}
    _, second, _ = render_scenes(data, scenes)
    for size, values in loaded.values.items():
        assert torch.equal(values, encoded.values[size])
        with torch.no_grad():
            exact = styles_pipe.vae.encode(nn.functional.interpolate(second, (size, size), mode="area")).latents
        assert (values[:, 1] * STEP - exact).abs().max() <= STEP / 2 + 1e-5


def test_missing_scenes_are_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run python -m hasten_zoo"):
        load_scenes(tmp_path)


# --- training -------------------------------------------------------------------------------------------------------


@pytest.fixture
def marked(data: EmojiStyles) -> SceneLatents:
    """Scenes whose latents say which image they are: `2 * scene + (second)`."""
    scenes = _once(data)
    there, back = scene_texts(scenes)
    pairs = [data.pairs[i] for i in scenes.rows.tolist()]
    marks = torch.arange(2 * len(pairs), dtype=torch.int8).view(-1, 2, 1, 1, 1)
    values = {128: marks.expand(-1, -1, 16, 16, 16), 64: marks.expand(-1, -1, 16, 8, 8)}
    corner = torch.where(scenes.item >= 0, scenes.corner, -1).tolist()
    return SceneLatents(values, [p.style for p in pairs], [p.concept for p in pairs], there, back, corner)


@pytest.mark.parametrize(("size", "heaviest"), [(128, 9), (64, 4)])
def test_an_edit_leads_from_its_source_to_its_target(
    marked: SceneLatents, pipe: FluxKontextPipeline, size: int, heaviest: int
) -> None:
    edits = train.Edits(marked, pipe.tokenizer)
    targets, sources, text, weight = edits.draw(2000, torch.Generator().manual_seed(0), size)
    side = size // 16
    texts = pipe.tokenizer.batch_decode(text, skip_special_tokens=True)
    kinds: dict[str, int] = {}
    for k, said in enumerate(texts):
        source, target = round(float(sources[k, 0, 0]) / STEP), round(float(targets[k, 0, 0]) / STEP)
        i, j = source // 2, target // 2
        kinds[" ".join(said.split()[:2])] = kinds.get(" ".join(said.split()[:2]), 0) + 1
        if said.startswith("make it"):
            assert (source % 2, target % 2) == (0, 0)
            assert marked.concept[i] == marked.concept[j]
            assert said == f"make it {marked.style[j]}"
            assert i != j or marked.concept.count(marked.concept[i]) == 1
            assert bool((weight[k] == 1).all())
        elif said:
            assert i == j
            assert (source % 2, target % 2, said) in ((0, 1, marked.there[i]), (1, 0, marked.back[i]))
            heavy = (weight[k] > 1).view(side, side)
            assert int(heavy.sum()) == (heaviest if marked.corner[i] >= 0 else 0)
            if marked.corner[i] >= 0:
                rows, columns = heavy.nonzero().float().mean(0) > (side - 1) / 2
                assert CORNERS[marked.corner[i]] == f"{'bottom' if rows else 'top'} {'right' if columns else 'left'}"
    assert kinds["make it"] / 2000 == pytest.approx(train.STYLE_SHARE * 0.9, abs=0.04)
    assert kinds[""] / 2000 == pytest.approx(train.EMPTY_SHARE, abs=0.03)
    assert min(kinds["make the"], kinds["add the"], kinds["remove the"]) > 50


def test_it_starts_from_emoji_styles_with_more_words(styles_pipe: FluxPipeline, pipe: FluxKontextPipeline) -> None:
    for name, value in styles_pipe.transformer.state_dict().items():
        assert torch.equal(pipe.transformer.state_dict()[name], value)
    words, old_words = pipe.tokenizer.get_vocab(), styles_pipe.tokenizer.get_vocab()
    assert set(old_words) < set(words)
    assert {"make", "remove", "bottom", "penguin"} <= set(words) - set(old_words)
    for encoder in ("text_encoder", "text_encoder_2"):
        new, old = (getattr(owner, encoder).get_input_embeddings().weight for owner in (pipe, styles_pipe))
        assert torch.equal(new[words["cat"]], old[old_words["cat"]])
    longest = pipe.tokenizer(edits_data.instructions(STYLES)).input_ids
    assert max(map(len, longest)) <= 16
    assert pipe.tokenizer.unk_token_id not in {token for row in longest for token in row}


@pytest.mark.parametrize("size", [128, 64])
def test_training_asks_for_what_the_pipeline_does(pipe: FluxKontextPipeline, data: EmojiStyles, size: int) -> None:
    """One step from pure noise: the pipeline's answer is the noise minus the velocity that training predicts."""
    velocity = train.EditVelocity(nn.ModuleDict(learning_parts(pipe)), size)
    image = render_scenes(data, _once(data).part(slice(0, 1)))[0]
    image = nn.functional.interpolate(image, (size, size), mode="area")
    text = pipe.tokenizer("make it flat", padding="max_length", max_length=16, return_tensors="pt").input_ids
    noise = torch.randn(1, (size // 16) ** 2, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        source = pipe._pack_latents(pipe.vae.encode(image).latents, 1, 16, size // 8, size // 8)
        answer = pipe(
            image, "make it flat", height=size, width=size, max_area=size**2, _auto_resize=False,
            num_inference_steps=1, max_sequence_length=16, latents=noise, output_type="latent",
        ).images  # fmt: skip
        expected = noise - velocity(noise, source, torch.ones(1), text)
        blind = noise - velocity(noise, torch.zeros_like(source), torch.ones(1), text)
    assert torch.allclose(answer, expected, atol=1e-4)
    assert not torch.allclose(blind, expected, atol=1e-3)


@pytest.mark.slow
def test_it_learns_to_keep_and_to_change(pipe: FluxKontextPipeline) -> None:
    """Two images of one concept: given one of them and a style, the target is known, and noise tells nothing new."""
    torch.manual_seed(0)
    images = (torch.randn(3, 2, 16, 1, 1) / STEP).round().clamp(-127, 127).to(torch.int8)
    values = {size: images.expand(-1, -1, -1, size // 8, size // 8) for size in (128, 64)}
    texts = ["make the background red", "make the background navy", "make the background mint"]
    scenes = SceneLatents(values, STYLES, ["star"] * 3, texts, texts[::-1], [-1] * 3)
    net = nn.ModuleDict(learning_parts(pipe))
    objective = train.Objective(net, train.Edits(scenes, pipe.tokenizer), batch=8)
    training = Training(net, objective, Settings(lr=1e-2, warmup_steps=10))
    losses = [float(training.step().value.detach()) for _ in range(150)]
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20])


def _save_styles(pipe: FluxPipeline, folder: Path) -> None:
    average = nn.ModuleDict(learning_parts(pipe)).state_dict()
    export_styles({"average": average, "position": [0, 0, 0]}, pipe, folder)


@pytest.fixture
def start(styles_pipe: FluxPipeline, data: EmojiStyles, tmp_path: Path) -> Path:
    """Weights of the tiny one to start from, as they are read: in half precision; scenes are beside them."""
    _save_styles(styles_pipe, tmp_path / "start")
    save_scenes(encode_scenes(load_styles(tmp_path / "start").vae, data, _once(data)), tmp_path / "latents")
    return tmp_path / "start"


def _run(start: Path, *arguments: str) -> None:
    folder = start.parent
    common = ["--start", str(start), "--latents", str(folder / "latents"), "--out", str(folder), "--batch", "2"]
    train.main([*common, "--committed", "none", *arguments])


def test_the_command_goes_on_from_its_checkpoint_and_exports(start: Path, tmp_path: Path) -> None:
    _run(start, "--samples", "4", "--rank", "4")
    _run(start, "--samples", "8", "--rank", "4", "--minutes", "1", "--fall", "0.5")
    _run(start, "--export", str(tmp_path / "weights"))
    assert json.loads((tmp_path / "weights" / "training.json").read_text())["samples"] == 8
    loaded, plain = edits_model.load_pipeline(tmp_path / "weights", start), load_styles(start)
    assert type(loaded) is FluxKontextPipeline
    assert "remove" in loaded.tokenizer.get_vocab()
    average, factors = read_checkpoint(tmp_path)["average"], 0
    for part, module in learning_parts(loaded).items():
        assert not module.training
        before = getattr(plain, part).state_dict()
        for name, value in module.state_dict().items():
            place = f"{part}.{name}".removesuffix("weight")
            if f"{place}up" in average:
                up, down = (average[f"{place}{factor}"].half().float() for factor in ("up", "down"))
                torch.testing.assert_close(value - before[name], up @ down, atol=1e-6, rtol=1e-3)
                factors += 1
            else:
                assert torch.equal(value, average[f"{part}.{name}"].half().float())
    assert factors > 20
    with pytest.raises(ModelError, match=r"a run with --rank 4, now it is 5"):
        _run(start, "--samples", "8", "--rank", "5", "--minutes", "1", "--fall", "0.5")


def test_an_editor_on_other_weights_is_refused(start: Path, tmp_path: Path) -> None:
    _run(start, "--samples", "2", "--rank", "4")
    other = load_styles(start)
    other.transformer.proj_out.bias.data += 1
    _save_styles(other, tmp_path / "other")
    with pytest.raises(ModelError, match=r"a run with weights it starts from [0-9a-f]+, now"):
        _run(tmp_path / "other", "--samples", "4", "--rank", "4")
    with pytest.raises(ModelError, match="started from other weights of emoji-styles; name their folder with --start"):
        _run(tmp_path / "other", "--export", str(tmp_path / "weights"))
    _run(start, "--export", str(tmp_path / "weights"))
    with pytest.raises(ModelError, match="holds differences from other weights of emoji-styles"):
        edits_model.load_pipeline(tmp_path / "weights", tmp_path / "other")


# --- held-out edits -------------------------------------------------------------------------------------------------


def test_held_out_edits_lead_to_held_out_pairs_or_change_them(data: EmojiStyles) -> None:
    edits = held_out_edits(data, {"style": 1, "background": 1, "object": 1})
    assert [true.what for true in edits] == ["style", "background", "object"]
    assert {(true.pair.style, true.pair.concept) for true in edits} == {("flat", "star")}
    style, background, item = (true.edit for true in edits)
    assert style.prompt == "make it flat"
    assert style.mask.all()
    assert background.prompt.startswith("make the background")
    assert item.kind == "local"
    again = held_out_edits(data, {"style": 1, "background": 1, "object": 1})
    assert all(torch.equal(a.edit.target, b.edit.target) for a, b in zip(edits, again, strict=True))


def _flat_colours(image: torch.Tensor) -> int:
    """How many colours an image has that are not those of edges, of a few pixels each."""
    _, pixels = image.flatten(1).round(decimals=2).unique(dim=1, return_counts=True)
    return int((pixels > 60).sum())


def test_objects_are_added_and_removed_where_the_instruction_says(data: EmojiStyles) -> None:
    shown = {"add": 0, "remove": 0}
    for seed in range(12):
        (true,) = held_out_edits(data, {"object": 1}, seed)
        edit, word = true.edit, true.edit.prompt.split()[0]
        changed = (edit.source - edit.target).abs().amax(0) > 1e-6
        assert changed.any()
        assert not (changed & ~edit.mask).any()
        before, after = (_flat_colours(image) for image in (edit.source, edit.target))
        assert (before, after) == ((2, 3) if word == "add" else (3, 2))  # the rectangle, what is behind it, an object
        shown[word] += 1
    assert min(shown.values()) > 2


def test_distinct_edits_differ_in_their_instructions(data: EmojiStyles) -> None:
    pairs = [Pair(p.style, p.concept, "Animals & Nature", True, p.concept == "star") for p in data.pairs[:10]]
    pairs += [Pair("3d", "star", "Animals & Nature", True, False), *data.pairs[11:]]
    edits = held_out_edits(EmojiStyles(pairs, data.images), {"style": 2, "background": 2}, distinct=True)
    assert len({true.edit.prompt for true in edits}) == len(edits) == 4


def test_edits_come_back_from_their_file(data: EmojiStyles, styles_pipe: FluxPipeline, tmp_path: Path) -> None:
    path, vae = tmp_path / "edits.safetensors", styles_pipe.vae
    edits = held_out_edits(data, dict.fromkeys(COUNTS, 1))
    save_edits(edits, vae, path)
    for true, read in zip(edits, read_edits(path, vae, data.pairs), strict=True):
        assert (read.prompt, read.kind) == (true.edit.prompt, true.edit.kind)
        assert torch.equal(read.mask, true.edit.mask)
        with torch.no_grad():
            through = vae.decode(vae.encode(true.edit.target[None] * 2 - 1).latents).sample.clamp(-1, 1)[0]
        assert (read.target * 2 - 1 - through).abs().mean() < 0.02
    for other in ({"held_out": False}, {"category": "Objects"}):
        pairs = [replace(pair, **other) if pair.held_out else pair for pair in data.pairs]
        with pytest.raises(
            ModelError, match=r"the pair flat, star, which is not one of the 0 that are held out of what"
        ):
            read_edits(path, vae, pairs)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"edits\.safetensors"):
        read_edits(path, vae, data.pairs)


def test_the_edits_that_come_with_the_model_are_of_pairs_that_are_measured() -> None:
    vae = EmojiVAE.from_pretrained(STYLES_WEIGHTS / "vae").eval()
    edits = read_edits(EDITS, vae, judge.read_judge(STYLES_HERE)[0])
    words = Counter(edit.prompt.split()[0] for edit in edits)
    assert len({edit.prompt for edit in edits}) == words.total() == sum(COUNTS.values())
    assert min(words["add"], words["remove"]) > COUNTS["object"] / 3
    assert EDITS.stat().st_size <= 700_000


def test_an_edit_is_done_if_it_is_nearer_to_the_target_and_keeps_the_rest(data: EmojiStyles) -> None:
    for true in held_out_edits(data, dict.fromkeys(COUNTS, 1)):
        edit = true.edit
        assert is_done(edit, edit.target)
        assert not is_done(edit, edit.source)
        spoiled = torch.where(edit.mask, edit.target, 1 - edit.source)
        assert is_done(edit, spoiled) == bool(edit.mask.all())


def test_what_shows_nothing_of_the_target_has_not_done_an_edit() -> None:
    random = torch.Generator().manual_seed(0)
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    mask[8:40, 8:40] = True
    plain = torch.full((3, SIZE, SIZE), 0.8)
    thing = torch.where(
        mask, torch.rand(3, 8, 8, generator=random).repeat_interleave(16, 1).repeat_interleave(16, 2), plain
    )
    edits = {
        "add": Edit("add it", plain, thing, mask, "local"),
        "remove": Edit("remove it", thing, plain, mask, "local"),
    }
    patches = {
        name: torch.where(mask, edit.target[:, mask].mean(1)[:, None, None], edit.source)
        for name, edit in edits.items()
    }
    for edit in edits.values():
        assert is_done(edit, torch.lerp(edit.source, edit.target, 0.7))
        assert not is_done(edit, torch.lerp(edit.source, edit.target, 0.4))  # nearer to the target is not enough
        assert not is_done(edit, torch.where(mask, 0.2, edit.source))
    assert not is_done(edits["add"], patches["add"])  # a patch of the right colour is no object
    assert is_done(edits["remove"], patches["remove"])


def test_an_exported_editor_is_a_subject(
    start: Path, data: EmojiStyles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = held_out_edits(data, dict.fromkeys(COUNTS, 1))
    save_edits(edits, load_styles(start).vae, tmp_path / "edits.safetensors")
    with pytest.raises(ModelError, match="no emoji-styles-edit weights"):
        load_emoji_styles_edit(tmp_path / "weights", tmp_path / "edits.safetensors", start)
    _run(start, "--samples", "2", "--rank", "4")
    _run(start, "--export", str(tmp_path / "weights"))
    with pytest.raises(ModelError, match="the pair flat, star, which is not one of the 164"):
        load_emoji_styles_edit(tmp_path / "weights", tmp_path / "edits.safetensors", start)
    monkeypatch.setattr(judge, "read_judge", lambda _: (data.pairs, {}))
    model = load_emoji_styles_edit(tmp_path / "weights", tmp_path / "edits.safetensors", start)
    model.pipe.set_progress_bar_config(disable=True)
    assert [edit.prompt for edit in model.edits] == model.prompts
    assert model.grade is not None
    assert model.grade(torch.stack([edit.target for edit in model.edits]), model.prompts) == [True] * 3
    with pytest.raises(ConfigError, match="no held-out edit has the prompt 'fly'"):
        model.grade(model.edits[0].target[None], ["fly"])
    sources = torch.stack([edit.source for edit in model.edits])
    plain, guided = (evaluate.apply_edits(model.pipe, sources, model.prompts, 2, scale) for scale in (1.0, 3.0))
    assert plain.shape == (3, 3, SIZE, SIZE)
    assert not torch.equal(plain, guided)
