"""What benchmarks say of two arms on the same prompts, and that the benchmark of edits runs on a model of its form."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hasten_zoo.emoji_flux import LEAP as KNOWN_LEAP
from hasten_zoo.emoji_styles import HERE as STYLES_HERE
from hasten_zoo.emoji_styles.judge import read_judge
from hasten_zoo.emoji_styles.model import build_pipeline, build_tokenizer
from hasten_zoo.emoji_styles.vae import EmojiVAE
from hasten_zoo.emoji_styles_edit import CALL, EDITS, is_done
from hasten_zoo.emoji_styles_edit.edits import read_edits
from hasten_zoo.emoji_styles_edit.model import build_pipeline as build_edit
from test_readme import script

from hasten.bench.subject import Subject, open_model
from hasten.bench.thresholds import Trials
from hasten.calibration import Calibration
from hasten.fitting.leap_fitter import YARDSTICK

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


def pipeline(flops: dict[str, float], asked: list[str] | None = None) -> Callable[[str], dict[str, Any]]:
    """Measures arms of given operations, and plain samplers whose calls cost 7 apart from steps of 2 each."""

    def measure(text: str) -> dict[str, Any]:
        if asked is not None:
            asked.append(text)
        name, _, count = text.partition("@")
        if name == "dpmpp":
            raise ValueError("not for this model")
        return row(flops[text] if text in flops else 7.0 + 2.0 * int(count), [30.0, 31.0])

    return measure


def test_plain_samplers_are_the_cheapest_that_cost_at_least_as_much() -> None:
    against_plain = script("leads.py")["against_plain"]
    asked: list[str] = []
    arms = {"exact": 7.0 + 2.0 * 12, "more": 7.0 + 2.0 * 12.1, "less": 7.0 + 2.0 * 11.5, "cheap": 3.0, "dear": 115.0}
    measure = pipeline(arms, asked)
    found = {arm: against_plain(arm, measure, 50, SIGNS, ("euler", "unipc", "dpmpp")) for arm in arms}
    assert {arm: one["steps"] for arm, one in found.items()} == {
        "exact": 12,  # not 14, though the full run of 107 costs 3.45 times as much
        "more": 13,
        "less": 12,
        "cheap": 1,
        "dear": 54,
    }
    assert {"euler@12", "unipc@12", "dpmpp@12"} <= set(asked)
    assert (found["exact"]["lacking"], found["exact"]["psnr"]["mean"]) == (["dpmpp"], 0.0)


def test_the_number_of_plain_steps_is_checked_on_what_the_rival_costs() -> None:
    against_plain = script("leads.py")["against_plain"]
    flops = {"arm": 31.0, "euler@12": 30.0, "unipc@13": 30.5}  # these steps cost less than the others
    found = against_plain("arm", pipeline(flops), 50, SIGNS, ("euler", "unipc"))
    assert (found["steps"], found["lacking"], found["psnr"]["best"]) == (13, ["unipc"], "euler@13")


def test_prompts_that_two_arms_do_not_share_give_no_lead() -> None:
    leads = script("leads.py")["leads"]
    assert leads(row(1.0, [30.0, None]), {"a": row(1.0, [None, 31.0])}, SIGNS) == {}


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
    arm = "specedit:draft=2:mixed=1:final=1"

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
    table = stages(monkeypatch, "edits_table", first | {"edits": {"number": 2}, "guidance": 1.0})
    above, below = table.split("By the kind of edit:")
    (shown,) = [line.split(" | ") for line in above.splitlines() if "specedit" in line]
    assert shown[1] == f"{rows[arm]['ratio']:.2f}"
    assert shown[2] == f"{rows[arm]['means']['truth_lpips']:.4f}"
    assert shown[3].startswith(f"{rows[arm]['against']['truth_lpips']['mean']:+.4f} (")
    by_kind = {
        line.split(" | ")[0].split(", ")[-1]: line.split(" | ") for line in below.splitlines() if "mixed" in line
    }
    assert {kind: cells[6] == "-" for kind, cells in by_kind.items()} == {"added (1)": False, "style (1)": True}
    assert below.endswith(f"Not measured: default, 2: {rows[refused]['refused'].rstrip('.')}.")
    monkeypatch.setattr(edits["Bed"], "figures", lambda *_: pytest.fail("measured again"))
    assert measured([refused, arm])["rows"] == rows
    with pytest.raises(SystemExit, match="give another --json"):
        measured([arm], asked=3)
    file.write_text(json.dumps(first | {"weights": "0" * 8}))
    with pytest.raises(SystemExit, match="other weights"):
        measured([arm])
    file.write_text(json.dumps({name: value for name, value in first.items() if name != "weights"}))
    with pytest.raises(SystemExit, match=r"edits\.json does not say of which weights"):
        measured([arm])


def test_rows_say_their_commit_and_what_could_not_run_is_tried_again_on_another(
    edit_model: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, file = script("leads.py")["Results"], tmp_path / "rows.json"
    on = partial(monkeypatch.setitem, results.__init__.__globals__, "environment")
    on(lambda: {"commit": "first"})
    first = results(file, edit_model, {})
    first.add("full", [10], {"psnr": [float("inf"), 30.0], "done": [1.0, None]})
    first.lack("peer", "failed", "RuntimeError: no such file")
    with pytest.raises(ValueError, match="not finite: psnr"):
        first.add("broken", [10], {"psnr": [float("nan"), 30.0]})
    assert (first.has("full"), first.has("peer"), first.has("broken")) == (True, True, False)
    on(lambda: {"commit": "second"})
    second = results(file, edit_model, {})
    assert (second.has("full"), second.has("peer")) == (True, False)
    second.add("peer", [5], {"psnr": [20.0, 30.0]})
    rows = json.loads(file.read_text(), parse_constant=lambda text: pytest.fail(text))["rows"]
    assert {text: one["commit"] for text, one in rows.items()} == {"full": "first", "peer": "second"}
    assert rows["full"]["means"] == {"psnr": 65.0, "done": 1.0}  # identical images are at the ceiling of 100 dB
    assert "failed" not in rows["peer"]


def test_fits_are_kept_apart_by_what_they_learn_from(
    edit_model: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = script("fits.py")["Fits"]

    def folder(prompts: tuple[str, ...] = ("a", "b"), seed: int = 1000, batch: int = 2, tried: int = 2000) -> Path:
        calls = [
            {"prompt": list(prompts[i : i + batch]), "generator": [torch.Generator().manual_seed(seed + i)]}
            for i in range(0, len(prompts), batch)
        ]
        trials = partial(Trials, edit_model, ["c"], tried, 50, {})
        return Path(fits(edit_model.pipe, calls, (), trials, tmp_path).folder)

    found = [folder(), folder(("a", "c")), folder(seed=1), folder(batch=1), folder(tried=1)]
    assert len(set(found)) == len(found)
    assert folder() == found[0]
    monkeypatch.setattr("hasten.__version__", "another")
    assert folder() not in found


def test_a_kept_fit_of_leap_that_made_another_error_small_is_made_again(
    edit_model: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [{"prompt": ["a"], "generator": [torch.Generator().manual_seed(0)]}]
    known = Calibration.load(KNOWN_LEAP)
    of_today, of_another = (replace(known, options=known.options | {"yardstick": YARDSTICK + i}) for i in (0, 1))
    trials = partial(Trials, edit_model, ["c"], 1, 50, {})
    asked: list[Calibration | None] = []

    def fit(*_: object, known: Calibration | None, **more: object) -> Calibration:
        asked.append(known)
        return of_today

    monkeypatch.setattr("hasten.fit_leap", fit)
    before = replace(known, options={name: one for name, one in known.options.items() if name != "yardstick"})
    for kept in (of_today, of_another, before):
        fits = script("fits.py")["Fits"](edit_model.pipe, calls, (9,), trials, tmp_path)
        kept.save(fits.folder / "leap.safetensors")
        assert fits.leap.options == of_today.options
    assert asked == [None, None]


def stages(monkeypatch: pytest.MonkeyPatch, name: str, content: dict[str, Any]) -> str:
    """A table of methods with stages of some content of a file."""
    table = script("tables.py")[name]
    assert table("no-such-file.json") == ""
    monkeypatch.setitem(table.__globals__, "read", lambda _: content)
    return str(table("tables.py"))


def test_clips_are_shown_beside_plain_samplers_and_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    leads = script("leads.py")
    signs = {"full_psnr": 1, "right": 1}

    def clips(flops: float, psnr: list[float], right: list[float]) -> dict[str, Any]:
        figures = {"full_psnr": psnr, "right": right}
        means = {name: sum(values) / len(values) for name, values in figures.items()}
        return {"flops": flops, "ratio": 10 / flops, "figures": figures, "means": means}

    rows = {
        "euler@50": clips(10.0, [60.0, 60.0], [1.0, 1.0]),
        "euler@25": clips(5.0, [20.0, 24.0], [1.0, 0.0]),
        "dvg:budget=0.5": clips(5.0, [23.0, 27.0], [1.0, 1.0]),
        "dvg:budget=0.5:compress=space": clips(5.5, [22.0, 22.0], [0.0, 1.0]),
    }
    arm = rows["dvg:budget=0.5"]
    arm["against"] = leads["leads"](arm, {"euler@25": rows["euler@25"]}, signs) | {"steps": 25}
    forms = {form: lambda text, form=form: f"compress={form}" in text for form in ("space", "time")}
    arm["rivals"] = leads["rival_leads"](rows, "dvg:budget=0.5", forms, signs)
    about = {"hasten": "1", "torch": "2", "device": "cpu"}
    content = {"environment": about, "prompts": 2, "size": [33, 64, 64], "guidance": 3.0, "rows": rows}
    table = stages(monkeypatch, "clips_table", content | {"refused": {"dvg:budget=0.1": "no plan."}})
    first, second = [line.split(" | ") for line in table.splitlines() if line.startswith("| **dvg")]
    assert first[1:4] == ["2.00", "25.0", "+3.0 (+3.0 to +3.0)"]
    assert second[1:3] == ["leaving out pixels alone, 1.10 times the operations", "+3.0 (+1.0 to +5.0)"]
    assert "2 held-out captions, 33 frames of 64x64, guidance 3" in table
    assert table.endswith("Not measured: dvg, budget=0.1: no plan.")


def judged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: str, content: dict[str, Any]) -> str:
    """The page's table of a result of ours."""
    tables = script("tables.py")
    table = tables["styles_table" if file == "styles.json" else "fashion_table"]
    for function in (table, table.__globals__["read"]):
        monkeypatch.setitem(function.__globals__, "ROOT", tmp_path)
    (tmp_path / "benchmarks").mkdir(exist_ok=True)
    about = {"environment": {"hasten": "1", "torch": "2", "device": "cpu"}}
    (tmp_path / "benchmarks" / file).write_text(json.dumps(content | about))
    return str(table([file] if file == "styles.json" else file))


def test_what_is_added_to_the_distilled_model_is_not_shown_as_better_than_plain_samplers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def lead(value: float) -> dict[str, Any]:
        return {"steps": 3, "full_psnr": {"best": "x", "mean": value, "interval": [value, value]}}

    known = {"ratio": 9.0, "means": {"full_psnr": 20.0}}
    rows = {
        "foca:schedule=even@9": known | {"against": lead(1.5)},
        "turbo default@2": known | {"against": lead(2.5), "against_four": lead(-3.5)},
        "l2p:schedule=even@7": {"failed": "RuntimeError: no file"},
    }
    content = {"guidance": 1.0, "pairs": 4, "plain": ["euler", "unipc"], "truth": {"blind": 0.5}, "rows": rows}
    shown = judged(monkeypatch, tmp_path, "styles.json", content)
    above, below = shown.split("added to the distilled model")
    assert "+1.5" in above
    assert "+2.5" not in above
    assert "best of 2 chosen by hand (plain, plain UniPC)" in above
    (cells,) = [line for line in below.splitlines() if "default" in line]
    assert cells.index("| 3 |") < cells.index("+2.5") < cells.index("-3.5")
    assert "l2p, even steps, 7 (guidance 1): RuntimeError: no file" in below


def test_arms_without_figures_are_named_with_their_guidance_and_number(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def one(arm: str, count: int, scale: float, **more: Any) -> dict[str, Any]:
        return {"arm": arm, "computed_steps": count, "guidance": scale} | more

    rows = [
        one("full", 50, 4.0, frechet=1.0),
        one("fbcache", 9, 4.0, frechet=2.0, really_computed=7.9),
        one("fbcache", 5, 4.0, refused="no threshold"),
        one("fbcache", 9, 1.5, refused="no threshold"),
    ]
    shown = judged(monkeypatch, tmp_path, "fashion.json", {"images": 8, "floor": {"frechet": 0.5}, "rows": rows})
    assert "| 7.9 |" in shown
    told = "fbcache, 5 (guidance 4): no threshold; fbcache, 9 (guidance 1.5): no threshold."
    assert shown.endswith(f"Not measured: {told}")


def test_an_error_of_a_fit_costs_the_arm_alone_and_is_tried_again_on_another_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fashion = script("fashion.py")
    measure, file = object.__new__(fashion["Measure"]), tmp_path / "fashion.json"
    measure.rows, measure.about, measure.options = [], {}, SimpleNamespace(json=file)

    def fail(text: str) -> None:
        raise RuntimeError(f"no fit\nof {text}")

    bed = SimpleNamespace(guidance=4.0, fits=SimpleNamespace(arm=fail))
    for commit in ("first", "second"):
        monkeypatch.setitem(
            fashion["Measure"].write.__globals__, "environment", lambda commit=commit: {"commit": commit}
        )
        for name in ("foca", "fbcache"):
            measure.arm(bed, name, 9, torch.zeros(1), {})
    rows = json.loads(file.read_text())["rows"]
    assert [row["arm"] for row in rows] == ["foca", "fbcache"]  # the older rows are replaced
    assert rows[0]["failed"] == "RuntimeError: no fit of foca@9"
    assert "foca@9 at guidance 4: " in capsys.readouterr().out
    settled = fashion["is_settled"]
    assert [settled(rows[0], commit) for commit in ("first", "second")] == [False, True]


def test_rows_of_caches_that_were_measured_in_another_way_are_not_gone_on_with(
    edit_model: Subject, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    caching, out = script("caching.py"), tmp_path / "caching.json"
    monkeypatch.setitem(caching["Measure"].__init__.__globals__, "open_model", lambda _: edit_model)
    options = {"model": "any", "guidance": None, "steps": 50, "learn": 16, "held_out": 32, "batch": 8}

    def gone_on(**changed: int) -> Any:
        return caching["Measure"](SimpleNamespace(out=out, work=tmp_path, **options | changed))

    known = {"options": options, "weights": caching["weights_of"](edit_model), "rows": {"a": {"psnr": [1.0]}}}
    out.write_text(json.dumps(known))
    assert gone_on().has("a")
    with pytest.raises(SystemExit, match=r"caching\.json was measured with \{'held_out': 32\}"):
        gone_on(held_out=8)
    out.unlink()
    folders = {gone_on().work, gone_on(learn=8).work, gone_on(batch=4).work}
    assert len(folders) == 3  # what is fitted to other calls is not taken


def test_solvers_that_tuning_left_alone_or_that_one_schedule_lacks_have_a_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    table = script("tables.py")["hyca_table"]
    monkeypatch.setitem(table.__globals__["read"].__globals__, "ROOT", tmp_path)
    (tmp_path / "benchmarks").mkdir()
    tuned = {"method": "hyca, tuned", "schedule": "even", "count": 9, "mean": 31.5, "chosen": {}, "tuned_on": 8}
    options = {"model": "emoji-flux", "held_out": 4}
    (tmp_path / "benchmarks" / "one.json").write_text(json.dumps({"options": options, "rows": {"a": tuned}}))
    assert "| by whole runs of 8 other prompts: even as fitted | - | 31.50 |" in table("one.json")


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


def test_the_table_of_peers_has_the_best_of_each_and_a_second_line_where_that_costs_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    table = script("tables.py")["peers_table"]
    for function in (table.__globals__["_groups"], table.__globals__["read"], table.__globals__["result_of"]):
        monkeypatch.setitem(function.__globals__, "ROOT", tmp_path)
    (tmp_path / "benchmarks").mkdir()

    def one(psnr: list[float], flops: float) -> dict[str, Any]:
        return {"flops": flops, "figures": {"full_psnr": psnr}, "means": {"full_lpips": 0.5 / psnr[0]}}

    rows = {
        "leap@9": one([50.0, 52.0], 10.0),
        "foca:schedule=even@9": one([40.0, 42.0], 10.0),
        "hicache:schedule=even@9": one([30.0, 62.0], 10.0),
        "peer:dbcache@9": one([39.0, 39.0], 20.0),
        "peer:hermite@9": one([33.0, 35.0], 10.0),
        "unipc@9": one([38.0, 38.0], 9.0),
        "turbo foca@9": one([90.0, 90.0], 1.0),
        "fresco:preset=18": one([90.0, 90.0], 1.0),
        "foca:schedule=even@7": one([40.0, 42.0], 10.0),
        "unipc@7": one([38.0, 38.0], 9.0),
        "peer:hermite@7": {"refused": "no such thing"},
    }
    styles = {"plain": ["unipc"], "guidance": 3.0, "rows": rows}
    fashion = [
        {"guidance": 1.5, "computed_steps": 9, "arm": arm, "flops": flops, "psnr": psnr, "frechet": frechet}
        for arm, flops, psnr, frechet in [
            ("foca", 1.0, 39.0, 3.0),
            ("peer:hermite", 1.0, 34.0, 4.0),
            ("dpmpp:spacing=beta", 1.0, 36.0, 3.0),
        ]
    ]
    for name, content in (("styles.json", styles), ("fashion.json", {"rows": fashion})):
        (tmp_path / "benchmarks" / name).write_text(json.dumps(content))
    lines = table([], ["styles.json", "absent.json"], "fashion.json").splitlines()[2:-2]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    own = ["emoji-styles", "3", "9", "**hicache, even steps** (of 2)", "46.0"]
    plain = ["plain UniPC", "38.0", "+8.0 (-8.0 to +24.0)"]
    dear = ["dbcache (another library)", "39.0", "+7.0 (-9.0 to +23.0)", "2.00", "0.0167", "0.0128"]
    cheap = ["hermite (another library)", "34.0", "+12.0 (-3.0 to +27.0)", "1.00", "0.0167", "0.0152"]
    assert cells[:2] == [own + dear + plain, own + cheap + plain]
    assert " | ".join(cells[2]) == (
        "fashion-dit | 1.5 | 9 | **foca** (of 1) | 39.0 | hermite (another library) | 34.0 | +5.0 | 1.00 | 3.00 | 4.00 "
        "| plain DPM-Solver++, beta | 36.0 | +3.0"
    )
    assert len(cells) == 3


def test_the_table_of_peers_of_a_bench_is_by_its_library_and_number() -> None:
    tables = script("tables.py")
    front = tables["read"]("front.json")["rows"]
    lines = tables["peers_table"](["front"], [], "").splitlines()[2:-2]
    for line in lines:
        model, guidance, count, own, mean, peer, *_ = (cell.strip() for cell in line.strip("|").split("|"))
        assert (model, guidance) == ("emoji-flux", "-")
        rows = [row for row in front if row["budget"] == int(count) and row["psnr"] is not None]
        means = {row["id"]: sum(one["psnr"] for one in row["per_prompt"]) / 32 for row in rows}
        own_rows = [row for row in rows if row["library"] == "hasten" and row["method"] != "leap"]
        caches = {row["id"]: means[row["id"]] for row in own_rows}
        assert mean == f"{max(caches.values()):.1f}"
        assert own.endswith(f"(of {len(caches)})")
        library = peer.rpartition("(")[2].rstrip(")")
        assert library in {row["library"] for row in rows} - {"hasten", "plain"}
    assert {line.split("|")[3].strip() for line in lines} == {"12", "9", "7", "5"}


def test_a_sampler_that_fails_on_the_way_leaves_its_noise_to_the_next_one(tmp_path: Path) -> None:
    """Linear spacing is refused in the call, by pipelines that ask for levels of their own."""
    model = open_model("emoji-flux")
    model.pipe.set_progress_bar_config(disable=True)
    held_out = script("held_out.py")["HeldOut"](model, 6, 2, 2, 2, tmp_path)
    best, tried = held_out.best_plain(3, None)
    assert "euler:spacing=linear" not in tried
    for label in ("euler", "unipc", best):
        images = held_out.plain(label)(held_out.calls(None), 3)
        assert tried[label] == pytest.approx(sum(held_out.quality(images, None)) / 2, abs=0.01)


@pytest.mark.parametrize("name", ["hyca", "foca", "hicache", "taylorseer", "freqca", "svdcache", "l2p", "reuse"])
def test_the_curves_of_a_method_are_few_enough_to_be_told_apart(name: str) -> None:
    curves = script("curves.py")
    assert 3 <= len(curves["caching_curves"](name, curves["MEASURED"])) <= 12


NEAR = {"euler": (31.0, 0.2, 0.5), "unipc": (30.0, 0.1, 0.6), "dpmpp": (10.0, 0.9, 0.9)}  # PSNR, LPIPS, changes


class FakeBed:
    """Clips are names, and figures are known by name."""

    def __init__(self) -> None:
        self.drawn: list[str] = []

    def first(self, text: str) -> str:
        name, _, steps = text.partition("@")
        assert int(steps) > 1
        self.drawn.append(name)
        if name not in NEAR:
            raise ValueError(f"{name} has no such spacing")
        return name

    def figures(self, clips: str) -> dict[str, list[float]]:
        measures = ("full_psnr", "full_lpips", "temporal_error")
        return {name: [value - 0.01, value + 0.01] for name, value in zip(measures, NEAR[clips], strict=True)}


def test_all_plain_samplers_are_tried_on_the_first_clips_and_the_nearest_go_on() -> None:
    screen, written = script("resolution_video.py")["screen"], list[int]()
    tried: dict[str, Any] = {}
    bed = FakeBed()
    assert screen(bed, tried, lambda: written.append(len(tried))) == ["euler", "unipc"]  # by any measure of distance
    assert written == list(range(1, len(tried) + 1))
    assert set(bed.drawn) == set(tried) > {"euler", "unipc", "dpmpp", "euler:spacing=karras"}
    assert tried["euler:spacing=karras"] == "ValueError: euler:spacing=karras has no such spacing"
    again = FakeBed()
    assert screen(again, tried, lambda: None) == ["euler", "unipc"]
    assert not {"euler", "unipc", "dpmpp"} & set(again.drawn)  # what is known is not drawn again, what failed is tried
