"""What benchmarks say of two arms on the same prompts, and that the benchmark of edits runs on a model of its form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hasten_zoo.emoji_styles import HERE as STYLES_HERE
from hasten_zoo.emoji_styles.judge import read_judge
from hasten_zoo.emoji_styles.model import build_pipeline, build_tokenizer
from hasten_zoo.emoji_styles.vae import EmojiVAE
from hasten_zoo.emoji_styles_edit import CALL, EDITS, is_done
from hasten_zoo.emoji_styles_edit.edits import read_edits
from hasten_zoo.emoji_styles_edit.model import build_pipeline as build_edit
from test_readme import script

from hasten.bench.subject import Subject

SIGNS = {"psnr": 1, "lpips": -1}


def row(flops: float, psnr: list[float | None], lpips: list[float | None] | None = None) -> dict[str, Any]:
    figures = {"psnr": psnr} | ({} if lpips is None else {"lpips": lpips})
    means = {
        name: sum(known) / len(known)
        for name, values in figures.items()
        if (known := [value for value in values if value is not None])
    }
    return {"flops": flops, "figures": figures, "means": means}


def test_a_lead_is_over_the_best_of_the_others_by_each_measure() -> None:
    leads = script("leads.py")["leads"]
    own = row(1.0, [30.0, 32.0, 34.0], [0.1, 0.2, 0.3])
    others = {"a": row(1.0, [29.0, 30.0, 31.0], [0.05, 0.15, 0.25]), "b": row(1.0, [10.0, 10.0, 10.0], [0.4, 0.4, 0.4])}
    found = leads(own, others, SIGNS)
    assert (found["psnr"]["best"], found["psnr"]["mean"]) == ("a", 2.0)
    assert (found["lpips"]["best"], found["lpips"]["mean"]) == ("a", -0.05)
    low, high = found["psnr"]["interval"]
    assert 1.0 <= low < 2.0 < high <= 3.0
    assert found["lpips"]["interval"] == [-0.05, -0.05]  # behind by as much on every prompt: differences are paired


def test_prompts_without_a_figure_and_measures_that_a_row_lacks_are_left_out() -> None:
    leads = script("leads.py")["leads"]
    found = leads(row(1.0, [30.0, None, 34.0], [0.1] * 3), {"a": row(1.0, [29.0, None, 31.0])}, SIGNS)
    assert list(found) == ["psnr"]
    assert found["psnr"]["mean"] == 2.0
    assert leads(row(1.0, [None, None]), {"a": row(1.0, [None, None])}, SIGNS) == {}


def test_a_rival_costs_at_least_as_much_and_no_more_than_it_must() -> None:
    rival_leads = script("leads.py")["rival_leads"]
    rows = {
        "fresco": row(10.0, [30.0, 30.0]),
        "ralu:a": row(9.99, [40.0, 40.0]),
        "ralu:b": row(10.0, [29.0, 29.0]),
        "ralu:c": row(12.0, [20.0, 20.0]),
        "bottleneck:a": row(9.0, [20.0, 20.0]),
    }
    families = {name: lambda text, name=name: text.startswith(name) for name in ("ralu", "bottleneck")}
    found = rival_leads(rows, "fresco", families, SIGNS)
    assert found["bottleneck"] is None
    assert (found["ralu"]["rival"], found["ralu"]["cost"], found["ralu"]["psnr"]["mean"]) == ("ralu:b", 1.0, 1.0)


def test_plain_samplers_cost_at_least_as_much() -> None:
    against_plain = script("leads.py")["against_plain"]
    asked: list[str] = []

    def measure(text: str) -> dict[str, Any]:
        asked.append(text)
        if text.startswith("dpmpp"):
            raise ValueError("not for this model")
        return row(1.0, [30.0, 31.0]) | {"ratio": 4.2}

    found = against_plain("fresco", measure, 50, SIGNS, ("euler", "unipc", "dpmpp"))
    assert asked == ["fresco", "euler@12", "unipc@12", "dpmpp@12"]  # 50 / 4.2 is 11.9
    assert (found["steps"], found["lacking"], found["psnr"]["mean"]) == (12, ["dpmpp"], 0.0)
    measure = lambda _: row(1.0, [30.0]) | {"ratio": 5.0}  # noqa: E731
    assert against_plain("fresco", measure, 50, SIGNS, ("euler",))["steps"] == 10


@pytest.fixture
def edit_model() -> Subject:
    """`emoji-styles-edit` before any training, in small, with two of its edits."""
    torch.manual_seed(0)
    vae = EmojiVAE(block_out_channels=(12, 48, 8, 8), blocks=(0, 0), decoder_blocks=(0, 0)).eval()
    pipe = build_edit(build_pipeline(build_tokenizer(["noto"], ["lemon"]), vae, width=32, double=1, single=1))
    known = {edit.prompt: edit for edit in read_edits(EDITS, vae, read_judge(STYLES_HERE)[0])}
    chosen = [next(edit for text, edit in known.items() if text.startswith(word)) for word in ("add", "make it")]

    def grade(images: torch.Tensor, prompts: list[str]) -> list[bool]:
        return [is_done(known[prompt], image) for prompt, image in zip(prompts, images, strict=True)]

    return Subject("emoji-styles-edit", pipe, [edit.prompt for edit in chosen], dict(CALL), grade, chosen)


@pytest.mark.filterwarnings("ignore:the edit touches most of the image")
@torch.no_grad()
def test_the_benchmark_of_edits_runs_on_an_untrained_model(
    edit_model: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits, file = script("styles_edit.py"), tmp_path / "edits.json"
    monkeypatch.setitem(edits["run"].__globals__, "STEPS", 5)
    arm = "specedit:discrepancy=latent:draft=2:mixed=1:final=1"

    def measured(arms: list[str], asked: int = 2) -> dict[str, Any]:
        results = edits["Results"](file, edit_model, {"edits": asked})
        bed = edits["Bed"](edit_model, edits["chosen"](edit_model, list(edits["KINDS"]), None), None)
        edits["run"](bed, results, arms)
        return dict(json.loads(file.read_text()))

    refused = "default@2"  # of `fits`, which edits have none of
    first = measured([refused, arm])
    rows = first["rows"]
    assert list(rows[refused]) == ["refused"]
    assert next(iter(rows)) == "euler@5"
    assert rows[arm]["ratio"] > 1
    assert len(rows[arm]["operations"]) == 2
    assert set(rows[arm]["by_kind"]) == {"style", "added"}
    style, added = rows[arm]["by_kind"]["style"], rows[arm]["by_kind"]["added"]
    assert "rest_full" in added
    assert "rest_full" not in style  # all of the image may change
    assert rows[arm]["figures"]["rest_full"][0] is None
    assert {"full_psnr", "truth_lpips", "edited", "done"} <= rows[arm]["against"].keys()
    monkeypatch.setattr(edits["Bed"], "figures", lambda *_: pytest.fail("measured again"))
    assert measured([refused, arm])["rows"] == rows
    with pytest.raises(SystemExit, match="give another --json"):
        measured([arm], asked=3)
    file.write_text(json.dumps(first | {"weights": "0" * 8}))
    with pytest.raises(SystemExit, match="other weights"):
        measured([arm])


def test_edits_of_no_sort_that_is_asked_for_end_the_benchmark(edit_model: Subject) -> None:
    chosen = script("styles_edit.py")["chosen"]
    assert chosen(edit_model, ["removed", "added"], None) == [edit_model.prompts[0]]
    with pytest.raises(SystemExit, match="no edits of emoji-styles-edit are removed or background: name other --kinds"):
        chosen(edit_model, ["removed", "background"], None)


def test_results_of_another_file_of_edits_are_not_gone_on_with(edit_model: Subject, tmp_path: Path) -> None:
    edits, file = script("styles_edit.py"), tmp_path / "edits.json"
    content, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    content.write_bytes(EDITS.read_bytes())
    other.write_bytes(EDITS.read_bytes() + b" ")
    asked = [edits["asked"](edit_model.prompts, ["added"], None, path) for path in (EDITS, content, other)]
    edits["Results"](file, edit_model, asked[0]).write()
    edits["Results"](file, edit_model, asked[1])
    with pytest.raises(SystemExit, match="give another --json"):
        edits["Results"](file, edit_model, asked[2])
    file.write_text(json.dumps(json.loads(file.read_text()) | {"edits": 2}))  # from before the file was asked for
    with pytest.raises(SystemExit, match="give another --json"):
        edits["Results"](file, edit_model, asked[0])


def test_arms_of_edits_can_be_read_and_those_that_cannot_end_the_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = script("styles_edit.py")
    edits["check_texts"](edits["ARMS"])
    monkeypatch.setitem(edits["main"].__globals__, "load_emoji_styles_edit", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr("sys.argv", ["styles_edit.py", "--arms", "specedti", "--json", str(tmp_path / "none.json")])
    with pytest.raises(SystemExit, match="arm 'specedti'"):
        edits["main"]()
