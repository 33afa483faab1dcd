"""The benchmark's store and comparison, the figures of a report, plots, and what the command line refuses."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from drape import bench, cli, store
from drape.bench import BenchSpec, rounded
from drape.compare import METRICS, compare, curve, defence_cost, gaps, same_verdict, separation, walks_needed
from drape.controls import CONTROLS, control, save_images
from drape.detectors.base import Candidates, Detector
from drape.errors import ConfigError, UnknownNameError
from drape.evaluate import DEFENCES, Judge, Subject
from drape.gamut import Gamut
from drape.io import load_record
from drape.lights import lit_walks
from drape.measure import Attacks, defence_row, defence_table, measure, track
from drape.objective import Temporal, aggregated, walks_loss
from drape.optimise import MODES, OptimiseSpec, draw_frames, frame_gradient
from drape.plots import azimuth_svg, bars_svg, curve_svg
from drape.report import page
from drape.scene.light import light_name
from drape.scene.scene import Scene
from drape.statistics import interval
from drape.store import Store
from drape.walks import INDOORS, TEST, under_lights

GREY = {name: torch.full((3, 8, 8), 0.5) for name in ("shirt", "trousers", "hat")}
TINY = BenchSpec(
    steps=2,
    batch=2,
    strengths=(1,),
    fps=0.5,
    size=64,
    cloth="skinned",
    train=2,
    walks=2,
    shared=1,
    lit=1,
    rounds=1,
    harden_steps=2,
)


class Hue(Detector):
    """Sees a person where the frame is more red than blue (or the other way); its box is the whole frame."""

    def __init__(self, name: str = "nanodet", sign: float = 1.0) -> None:
        super().__init__(name, 64)
        self.bias = torch.nn.Parameter(torch.tensor([0.6]), requires_grad=False)
        self.sign = sign

    def candidates(self, images: torch.Tensor) -> Candidates:
        redness = self.sign * (images[:, 0] - images[:, 2]).mean(dim=(1, 2)) * 10 + self.bias
        box = torch.tensor([0.0, 0, 64, 64]).expand(len(images), 1, 4)
        return Candidates(box, redness.clamp(0.01, 0.99)[:, None])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """All detectors are made up, here and in the command line."""
    sees = {"nanodet": 1.0, "yolov3-tiny": -1.0, "centernet": 0.5}
    for place in ("drape.bench", "drape.cli", "drape.harden"):
        monkeypatch.setattr(f"{place}.load_detector", lambda name: Hue(name, sees[name]))


# the optimisation's gradient


@pytest.mark.parametrize("reach", [0, 2])
def test_the_estimate_from_drawn_frames_has_the_gradient_as_its_mean(reach: int) -> None:
    generator = torch.Generator().manual_seed(0)
    d = torch.rand(9, generator=generator)
    gradient = frame_gradient([d], [d], OptimiseSpec(aggregation=reach, temporal=Temporal(window=3)))
    total = torch.zeros(9)
    for _ in range(6000):
        chosen, expected = draw_frames(gradient, 3, generator)
        total.index_add_(0, chosen, gradient[chosen] / expected)
    torch.testing.assert_close(total / 6000, gradient, atol=0.03 * float(gradient.abs().max()), rtol=0.06)
    chosen, expected = draw_frames(gradient, 9, generator)
    assert chosen.tolist() == list(range(9))
    assert torch.equal(expected, torch.ones(9))


def test_the_gradient_of_frames_equals_finite_differences() -> None:
    d = torch.linspace(0.1, 0.9, 7, dtype=torch.float64)
    spec = OptimiseSpec(aggregation=1, temporal=Temporal(window=3))

    def loss(values: torch.Tensor) -> float:
        walks, known = ([aggregated(part, 1) for part in (x[:3], x[3:])] for x in (values, d))
        return float(walks_loss(spec.temporal, walks, known))

    gradient = frame_gradient([d[:3], d[3:]], [d[:3], d[3:]], spec)
    for t in range(7):
        step = torch.zeros_like(d)
        step[t] = 1e-6
        assert (loss(d + step) - loss(d - step)) / 2e-6 == pytest.approx(float(gradient[t]), rel=1e-4)


def test_aggregated_lies_between_mean_and_maximum_of_what_has_passed() -> None:
    d = torch.rand(12, generator=torch.Generator().manual_seed(1))
    for reach in (1, 3):
        for t, value in enumerate(aggregated(d, reach).tolist()):
            near = d[max(t - reach, 0) : t + 1]
            assert float(near.mean()) - 1e-6 <= value <= float(near.max()) + 1e-6
    assert torch.equal(aggregated(d, 0), d)
    with pytest.raises(ConfigError, match="reach=-1"):
        aggregated(d, -1)


# figures


def test_a_defence_is_measured_by_what_it_wins_back_and_what_it_costs() -> None:
    clean, attacked = (
        {"recall": 0.9, "ap50": 0.95, "false_boxes": 0.1},
        {"recall": 0.1, "ap50": 0.3, "false_boxes": 0.1},
    )
    rows = {
        "clean": {"recall": 0.8, "ap50": 0.85, "false_boxes": 0.2},
        "attacked": {"recall": 0.5, "ap50": 0.6, "false_boxes": 0.3},
        "adaptive": {"recall": 0.3, "ap50": 0.4, "false_boxes": 0.3},
    }
    row = defence_row(clean, attacked, rows)
    assert row["recovered_recall"] == pytest.approx(0.5)
    assert row["recovered_recall_adaptive"] == pytest.approx(0.25)
    assert row["clean_ap50_loss"] == pytest.approx(0.1)
    assert (row["clean_false_boxes"], row["attacked_false_boxes"]) == (0.2, 0.3)
    assert "adaptive_recall" not in defence_row(clean, attacked, {k: rows[k] for k in ("clean", "attacked")})


def test_every_defence_that_can_be_has_a_row(scene: Scene) -> None:
    plain, blue = control("plain", Gamut.proxy()), {n: torch.tensor([0.2, 0.3, 0.9])[:, None, None] for n in GREY}
    blue = {name: value.expand(3, 8, 8).contiguous() for name, value in blue.items()}
    given = Attacks({"plain": plain}, {"worst": blue, "grey": GREY}, {"hardened": GREY})
    bolder = Hue("nanodet+threshold")
    bolder.threshold = 0.02
    subject = Subject(Hue(), [Hue("other", -1.0)], Hue("nanodet+hardened", -1.0), bolder)
    table = defence_table(Judge([scene]), subject, given)
    assert tuple(table) == DEFENCES
    assert [name for name, row in table.items() if "adaptive_recall" in row] == ["hardened"]
    assert table["union"]["recall"] == table["hardened"]["recall"] == 1.0  # the other one sees blue
    assert table["consensus"]["recall"] < 1.0  # and it is alone
    assert table["threshold"]["recall"] > table["median"]["recall"]
    assert tuple(defence_table(Judge([scene]), Subject(Hue()), given)) == ("aggregate", "median")


def test_controls_and_attacks_need_names_of_their_own() -> None:
    with pytest.raises(ConfigError, match="rename"):
        Attacks({"plain": GREY}, {"plain": GREY})
    with pytest.raises(ConfigError, match="plain"):
        Attacks({"noise": GREY}, {"worst": GREY})


CONDITIONS = {"drape": "1 & 2", "detectors": [], "walks": [{"gait": "stroll <i>"}], "plates": ["p.png"], "icc": None}
CONDITIONS["optimisation"] = {"spec": {"mode": "sequence", "seed": 7}}


def test_page_escapes_names_and_shows_every_row(scene: Scene) -> None:
    given = Attacks({"plain": GREY, "a <b>": GREY}, {"worst & last": GREY})
    measured = {**measure(Subject(Hue()), Judge([scene]), given), "conditions": CONDITIONS}
    assert measured["lights"] == {}
    text = page(measured, {"walk": b"GIF89a"}, "note <1>")
    for expected in ("a &lt;b&gt;", "worst &amp; last", "note &lt;1&gt;", "data:image/gif;base64,R0lGODlh"[:30]):
        assert expected in text
    for expected in ("1 &amp; 2", "stroll &lt;i&gt;", "p.png", "<td>textures: seed</td><td>7</td>"):
        assert expected in text
    assert "a <b>" not in text
    measured["libraries"] = {"missing": ["motmetrics"], "remedy": "pip install motmetrics"}
    assert "motmetrics missing" in page(measured, {})
    measured["libraries"] = {"plain": {"coco_map": 0.25, "idf1": 0.75}}
    assert "<td>0.250</td><td>0.750</td>" in page(measured, {})
    with pytest.raises(ConfigError, match="results"):
        page({"results": {}}, {})


def test_track_keeps_boxes_that_are_sure_enough(scene: Scene) -> None:
    red = {name: torch.tensor([0.9, 0.1, 0.1])[:, None, None].expand(3, 8, 8) for name in GREY}
    walks = Judge([scene]).walks(Hue(), "red", red)
    assert track(walks[0])[0] == [0.0, 0.0, 64.0, 64.0]
    blind = Hue()
    blind.threshold = 0.999
    assert track(Judge([scene]).walks(blind, "red", red)[0]) == [None] * 4


# plots


def shapes(svg: str, kind: str) -> list[ElementTree.Element]:
    return [e for e in ElementTree.fromstring(svg).iter() if e.tag == kind]


def test_plots_draw_values_where_they_belong() -> None:
    (line,) = shapes(curve_svg({"a": [0.0, 1.0]}), "polyline")
    assert line.get("points") == "34.0,186.0 606.0,34.0"
    bars = shapes(bars_svg({"x": {"sun": 1.0, "dusk": 0.5}, "y": {"sun": 0.0, "dusk": 0.25}}), "rect")
    assert [float(bar.get("height") or -1) for bar in bars] == pytest.approx([152, 76, 0, 38])
    polar = azimuth_svg({"a": {"0": 1.0, "90": 0.5, "180": None, "270": 0.5, "360": 1.0}})
    first, second = (e.get("points") for e in shapes(polar, "polyline"))
    assert first == "150.0,274.0 212.0,150.0"  # the front is below, the left side right
    assert second == "88.0,150.0 150.0,274.0"
    for broken in (lambda: curve_svg({}), lambda: bars_svg({}), lambda: azimuth_svg({}), lambda: curve_svg({"a": []})):
        with pytest.raises(ConfigError, match="expected"):
            broken()
    assert "&lt;b&gt;" in curve_svg({"<b>": [1.0]})


def test_long_names_go_into_further_rows_inside_the_plot():
    def top(svg):
        return float(ElementTree.fromstring(svg).get("viewBox").split()[1])

    few, many = curve_svg({"a": [1.0], "b": [0.0]}), curve_svg({f"a long name, the {i}th": [1.0] for i in range(7)})
    assert top(few) == 0
    names = [e for e in shapes(many, "text") if "long" in (e.text or "")]
    assert len({e.get("y") for e in names}) > 1
    assert top(many) < min(float(e.get("y")) for e in names) - 10
    assert max(float(e.get("x")) + 8 * len(e.text or "") for e in names) <= 640


# the benchmark


def tables_script() -> ModuleType:
    """The script that writes the tables of the docs."""
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "tables.py"
    found = importlib.util.spec_from_file_location("drape_tables", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def row(**values: list[float]) -> dict[str, object]:
    """Metrics of a texture; those that are not given are level."""
    level = {metric: [0.5] * 4 for metric in (*METRICS, "ap50", "false_boxes")}
    return {"by_walk": {**level, **values}}


def test_sequence_is_compared_with_a_baseline_seed_by_seed_and_walk_by_walk() -> None:
    results = {
        "sequence-0": row(area=[0.1, 0.2, 0.3, 0.4], longest_run=[0.2] * 4),
        "frames-0": row(area=[0.2, 0.3, 0.4, 0.5], longest_run=[0.1] * 4),
        "sequence-1": row(area=[0.2, 0.2, 0.2, 0.2]),
        "frames-1": row(area=[0.3, 0.3, 0.3, 0.3]),
    }
    found = compare(results, [0, 1], "frames")
    area, run = found["area"], found["longest_run"]
    assert area["gain"] == {
        "mean": pytest.approx(0.1),
        "low": pytest.approx(0.1),
        "high": pytest.approx(0.1),
    }
    assert (area["seeds_won"], area["seeds_lost"]) == (2, 0)
    assert area["sequence"] == pytest.approx([0.25, 0.2])
    assert area["mean"]["frames"]["low"] < 0.325 < area["mean"]["frames"]["high"]
    assert run["gain"]["mean"] == pytest.approx(-0.05)
    assert (run["seeds_won"], run["seeds_lost"]) == (0, 1)
    assert found["recall"]["gain"]["mean"] == 0


def test_walks_whose_verdict_is_always_the_same_are_counted() -> None:
    verdicts = {"plain": [0.0, 0.0, 0.0, 1.0], "random": [0.0, 1.0, 0.0, 1.0], "best": [1.0, 1.0, 0.0, 1.0]}
    results = {name: row(recall=[0.8 - 0.6 * missed for missed in values]) for name, values in verdicts.items()}
    assert same_verdict(results, list(verdicts)) == 0.5
    assert same_verdict(results, ["plain", "random"]) == 0.75
    assert same_verdict(results, list(verdicts), cut=0.9) == 1.0


def test_so_many_walks_are_needed_that_unpaired_intervals_just_lie_apart() -> None:
    """Of walks drawn as those that are known, about half of the pairs of intervals lie apart at that number."""
    rng = np.random.default_rng(0)
    known = {"a": rng.normal(0.5, 0.1, 200), "b": rng.normal(0.45, 0.1, 200)}
    results = {name: row(area=values.tolist()) for name, values in known.items()}
    needed = walks_needed(results, ["a"], ["b"])
    apart = {}
    for walks in (needed // 3, needed * 3):
        drawn = [[interval(rng.choice(values, (1, walks)), n) for values in known.values()] for n in range(20)]
        apart[walks] = sum(a.apart(b) for a, b in drawn)
    assert apart[needed // 3] < 8
    assert apart[needed * 3] > 15


def test_strengths_are_told_apart_though_walks_differ_more() -> None:
    """Textures that take the same from every walk: plain intervals overlap, those within walks do not."""
    walks = [0.9, 0.7, 0.4, 0.2]
    results = {
        f"{name}-{seed}": row(area=[value - step - 0.001 * seed for value in walks])
        for name, step in {"weak": 0.0, "middle": 0.05, "strong": 0.1}.items()
        for seed in range(2)
    }
    groups = {name: [f"{name}-0", f"{name}-1"] for name in ("weak", "middle", "strong")}
    told = separation(results, groups)
    assert told["apart"]
    assert told["steps_above_zero"]
    assert told["strengths"]["strong"]["step"]["mean"] == pytest.approx(0.05)
    wide = [told["strengths"][name]["interval"] for name in groups]
    assert wide[0]["low"] < wide[1]["high"]
    turned = separation(results, dict(reversed(list(groups.items()))))
    assert not turned["steps_above_zero"]  # a weaker texture is no step


def test_the_gap_to_unseen_walks_and_what_of_it_plain_clothes_have_too() -> None:
    test = {"plain": row(recall=[0.9] * 4), "sequence-0": row(recall=[0.5] * 4), "sequence-1": row(recall=[0.1] * 4)}
    train = {"plain": row(recall=[0.8] * 4), "sequence-0": row(recall=[0.3] * 4)}
    found = gaps(test, train, {"plain": ["plain"], "sequence": ["sequence-0", "sequence-1"], "frames": []}, "plain")
    assert set(found) == {"plain", "sequence"}
    assert found["sequence"]["gap"] == pytest.approx(0.2)  # of the seed that is known on both sides
    assert found["sequence"]["beyond_clean"] == pytest.approx(0.1)


def test_what_a_defence_restores_and_costs_on_each_walk() -> None:
    bare = {"plain": row(recall=[0.9] * 4, ap50=[0.8] * 4), "worst": row(recall=[0.2] * 4, longest_run=[0.1] * 4)}
    behind = {
        "plain": row(recall=[0.9] * 4, ap50=[0.7] * 4, false_boxes=[0.6] * 4),
        "worst": row(recall=[0.6] * 4, longest_run=[0.4] * 4),
    }
    found = defence_cost(bare, behind, "plain", "worst")
    assert found["recall_restored"]["mean"] == pytest.approx(0.4)
    assert found["longest_run_restored"]["mean"] == pytest.approx(0.3)
    assert found["clean_ap50_change"]["mean"] == pytest.approx(-0.1)
    assert found["clean_false_boxes_change"]["mean"] == pytest.approx(0.1)


def test_curves_are_means_of_walks_in_bins() -> None:
    curves = {"a": [0.2, 0.4, 0.9], "b": [0.6, 0.8]}
    places = {"a": np.array([0.1, 0.1, 0.9]), "b": np.array([0.2, 0.9])}
    low, middle, high = curve(curves, places, (0.0, 0.5, 0.8, 1.0))
    assert low["confidence"]["mean"] == pytest.approx((0.3 + 0.6) / 2)
    assert high["confidence"]["mean"] == pytest.approx((0.9 + 0.8) / 2)
    assert middle == {"from": 0.5, "to": 0.8, "walks": 0, "confidence": None}
    with pytest.raises(ConfigError, match="same walks"):
        curve(curves, {"a": places["a"]}, (0.0, 1.0))


def test_numbers_are_cut_wherever_they_are() -> None:
    assert rounded({"a": [0.123456, None, 3], "b": ("x", {"c": 1 / 3})}) == {
        "a": [0.1235, None, 3],
        "b": ["x", {"c": 0.3333}],
    }


def lamps() -> set[str]:
    """The lights of the walks that the small benchmark has under every light."""
    chosen = [TEST[n] for n in lit_walks(TEST[: TINY.walks], TINY.lit)]
    return {light_name(s.light) for walk in chosen for s in under_lights(walk, TINY.fps, TINY.size, TINY.cloth)}


def test_walks_of_both_kinds_of_place_are_seen_under_every_light() -> None:
    chosen = [TEST[n].place in INDOORS for n in lit_walks(TEST, 3)]
    assert len(chosen) == 6
    assert sum(chosen) == 3
    assert lit_walks(TEST, 0) == []
    assert lit_walks(TEST, 1000) == list(range(len(TEST)))


def test_a_benchmark_goes_on_where_it_was(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, to = tmp_path / "work", tmp_path / "figures.json"
    calls: list[str] = []
    real = store.optimise
    monkeypatch.setattr(store, "optimise", lambda *a, **k: (calls.append(a[3].mode), real(*a, **k))[1])
    looked: list[int] = []
    see = bench.KeptJudge.keep
    monkeypatch.setattr(bench.KeptJudge, "keep", lambda *a: (looked.append(1), see(*a))[1])
    first = bench.run_bench(TINY, work, to, seeds=2)
    made = len(calls)
    assert made == 2 * len(MODES) + 2 * 1 + 4 + 3  # modes, fewer steps, those that know, other detectors and all
    assert load_record(to, bench.FIGURES, "") == rounded(json.loads(json.dumps(first)))
    assert first["about"]["seeds"] == [0, 1]
    assert len(first["about"]["walks"]) == TINY.walks
    assert first["transfer"]["columns"] == ["nanodet", "yolov3-tiny", "centernet"]
    assert first["transfer"]["rows"][-2:] == ["against centernet", "against all together"]
    table = first["defences"]["table"]
    assert set(table) == set(DEFENCES)
    known = {name for name, row in table.items() if "adaptive_recall" in row}
    assert known == {"aggregate", "consensus", "hardened", "hardened+aggregate"}
    assert set(first["behind_aggregation"]) == set(first["sequence_against"]) == {"frames", "static"}
    assert set(first["intervals"]) == {*CONTROLS, *MODES, "1 steps"}
    assert all(i["low"] <= i["mean"] <= i["high"] for group in first["intervals"].values() for i in group.values())
    assert list(first["separation"]["strengths"]) == ["plain", "random", "1 steps", "2 steps"]
    assert 0 <= first["same_verdict"]["walks"] <= 1
    assert set(first["gaps"]) == {*CONTROLS, *MODES}
    assert set(first["thresholds"]) == {"nanodet", "nanodet+threshold", "nanodet+hardened"}
    assert set(first["lights"]["rows"]) == {"plain", "sequence-0"}
    assert first["lights"]["rows"]["plain"].keys() == first["lights"]["taken"]["sequence-0"].keys() == lamps()
    tables = tables_script()
    page = "".join(f"<!-- drape {name} -->\n<!-- end -->\n" for name in tables.TABLES)
    filled = tables.filled(page, first)
    assert "| sequence |" in filled
    assert "static: area" in filled
    assert f"{first['intervals']['noise']['area']['mean']:.2f} (" in filled
    passes = first["about"]["passes"]
    assert len({passes[f"{mode}-0"]["backward"] for mode in MODES}) == 1
    assert passes["all together"]["backward"] <= passes["sequence-0"]["backward"] + 3 * TINY.batch
    (work / "frames-0.seconds").unlink()
    next((work / "seen" / "nanodet_sequence-1").glob("*.npz")).unlink()
    before = len(looked)
    again = bench.run_bench(TINY, work, to, seeds=2)
    assert calls[made:] == ["frames"]  # only what was missing
    assert len(looked) == before + 1
    assert again["results"] == first["results"]
    fewer = bench.run_bench(replace(TINY, lit=0), work, to, seeds=2)  # nothing kept depends on how many are lit
    assert "lights" not in fewer
    assert fewer["results"] == first["results"]
    with pytest.raises(ConfigError, match="other settings"):
        Store(work, asdict(replace(TINY, steps=3)))
    monkeypatch.setattr(bench, "TEST", tuple(reversed(bench.TEST)))
    with pytest.raises(ConfigError, match="other settings"):  # other walks have other detections
        bench.run_bench(TINY, work, to, seeds=2)


def test_figures_are_there_after_every_stage(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is stopped in its second seed has the figures of the first."""
    real = bench.Bench.look_at_seed

    def stopped(self: bench.Bench, seed: int) -> None:
        if seed == 1:
            raise KeyboardInterrupt
        real(self, seed)

    monkeypatch.setattr(bench.Bench, "look_at_seed", stopped)
    with pytest.raises(KeyboardInterrupt):
        bench.run_bench(TINY, tmp_path / "work", tmp_path / "figures.json", seeds=3)
    found = load_record(tmp_path / "figures.json", bench.FIGURES, "")
    assert found["about"]["seeds"] == [0]
    assert "sequence-0" in found["results"]


@pytest.mark.parametrize(
    "changes",
    [
        {"shared": 0},
        {"walks": 999},
        {"detector": "centernet"},
        {"rounds": 0},
        {"weighting": "windwo"},
        {"strengths": (5, 1)},
        {"seeds_of_gaps": 0},
    ],
)
def test_benchmarks_that_cannot_run_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"expected|Known"):
        replace(TINY, **changes)  # type: ignore[arg-type]


# the command line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["optimise", "--detector", "nanodte"], "Did you mean 'nanodet'"),
        (["optimise", "--against", "medain"], "Did you mean 'median'"),
        (["optimise", "--against", "hardened"], "drape harden"),
        (["optimise", "--mode", "frame"], "Did you mean 'frames'"),
        (["optimise", "--weighting", "windwo"], "Did you mean 'window'"),
        (["optimise", "--product", "no.png"], "cannot be read as an image"),
        (["optimise", "--icc", "no.icc"], "printer"),
        (["optimise", "--cloth", "newtn"], "Did you mean 'newton'"),
        (["harden", "--rounds", "0"], "rounds=0"),
        (["evaluate", "--out", "nowhere"], "drape optimise"),
        (["evaluate", "--out", "made", "--compare", "x"], "NAME=FOLDER"),
        (["evaluate", "--out", "made", "--fail-under", "recal=0.5"], "Did you mean 'recall'"),
        (["evaluate", "--out", "made", "--fail-under", "recall=high"], "MEASURE=VALUE"),
        (["report", "--out", "nowhere"], "drape evaluate"),
        (["report", "--out", "made"], "evaluate.json"),
        (["optimise", "--out", "file"], "no folder"),
        (["harden", "--to", "x.pt"], ".npz"),
        (["harden", "--to", "made"], "is a folder"),
        (["bench", "--to", "made"], "is a folder"),
        (["optimise", "--seed", "1e30"], "--seed"),
        (["optimise", "--size", "1000000"], "--size"),
        (["optimise", "--fps", "0"], "--fps"),
        (["optimize"], "No such command"),
        (["bench", "--detector", "nanodte"], "Did you mean"),
    ],
)
def test_wrong_input_gives_a_line_that_says_what_to_do(
    arguments: list[str],
    says: str,
    quick: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load(name: str) -> Detector:
        if name != "nanodet":
            raise UnknownNameError(f"unknown detector {name!r}. Did you mean 'nanodet'?")
        return Hue()

    for place in ("drape.cli", "drape.bench"):
        monkeypatch.setattr(f"{place}.load_detector", load)
    monkeypatch.chdir(tmp_path)
    save_images(tmp_path / "made" / "textures.npz", GREY)
    (tmp_path / "made" / "evaluate.json").write_text("{broken")
    (tmp_path / "file").write_text("")
    options = [] if arguments[0] in ("report", "optimize") or "--size" in arguments else ["--size", "64"]
    monkeypatch.setattr(sys, "argv", ["drape", *arguments, *options])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
    assert says in error


def run_drape(monkeypatch: pytest.MonkeyPatch, command: str, *arguments: str) -> None:
    """A command at tiny size."""
    monkeypatch.setattr(
        sys, "argv", ["drape", command, *arguments, "--fps", "0.5", "--size", "64", "--cloth", "skinned"]
    )
    cli.app(standalone_mode=False)


def test_textures_made_against_defences_are_judged_with_them(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, arguments in {"a": [], "b": ["--mode", "frames"], "c": ["--against", "aggregate"]}.items():
        run_drape(
            monkeypatch, "optimise", "--train-walks", "2", "--steps", "1", "--out", str(tmp_path / name), *arguments
        )
    weights = tmp_path / "weights.npz"
    run_drape(
        monkeypatch,
        "harden",
        "--train-walks",
        "2",
        "--rounds",
        "1",
        "--attack-steps",
        "1",
        "--steps",
        "1",
        "--to",
        str(weights),
    )
    run_drape(
        monkeypatch,
        "evaluate",
        "--walks",
        "1",
        "--out",
        str(tmp_path / "a"),
        "--compare",
        f"frames={tmp_path / 'b'}",
        "--adaptive",
        f"aggregate={tmp_path / 'c'}",
        "--hardened",
        str(weights),
    )
    measured = json.loads((tmp_path / "a" / "evaluate.json").read_text())
    assert {"optimised", "frames"} <= set(measured["results"])
    assert "adaptive_recall" in measured["defences"]["aggregate"]
    assert "hardened+aggregate" in measured["defences"]
    assert len(measured["lights"]["plain"]) >= 2


def test_an_evaluation_below_a_limit_ends_with_an_exit_code_of_its_own(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Grey is seen by a detector of red with less than in plain clothes, which are red."""
    save_images(tmp_path / "textures.npz", GREY)
    common = ["drape", "evaluate", "--out", str(tmp_path), "--walks", "1", "--fps", "0.5", "--size", "64"]
    common += ["--cloth", "skinned", "--no-lights"]
    for limit, code in (("0.0", 0), ("0.5", 3)):
        monkeypatch.setattr(sys, "argv", [*common, "--fail-under", f"recall={limit}"])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == code
    assert "failed: recall" in capsys.readouterr().err


def test_the_texture_that_is_seen_least_is_named_even_if_it_is_a_control(scene: Scene) -> None:
    red, blue = (
        {n: torch.tensor(c)[:, None, None].expand(3, 8, 8) for n in GREY} for c in ((0.9, 0.1, 0.1), (0.1, 0.1, 0.9))
    )
    measured = measure(Subject(Hue()), Judge([scene]), Attacks({"plain": red, "blue": blue}, {"optimised": GREY}))
    assert measured["seen_least"] == "blue"
    assert measured["attack"] == "optimised"
    assert "Seen least: “blue”" in page({**measured, "conditions": CONDITIONS}, {})
