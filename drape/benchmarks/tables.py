"""The tables of drape/docs/drape.md, from drape/benchmarks/bench.json.

python drape/benchmarks/tables.py          write them between the pages' markers
python drape/benchmarks/tables.py --check  exit 1 if a page does not hold what the JSON file says
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from drape.compare import same_verdict, walks_needed
from drape.io import write_text
from drape.optimise import MODES
from drape.statistics import Interval

ROOT = Path(__file__).resolve().parents[1]
MISSING = "Not measured yet with this edition."
FIGURES = ROOT / "benchmarks" / "bench.json"
DEMO = ROOT / "benchmarks" / "demo.json"
FIRST = ROOT / "benchmarks" / "bench-0.1.0.json"
WEIGHTS = ROOT / "benchmarks" / "weights.json"
SCENES = ROOT / "benchmarks" / "scenes.json"
PAGES = (ROOT / "docs" / "drape.md",)
BLOCK = re.compile(r"(<!-- drape (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
METRICS = {
    "area": "area",
    "recall": "recall",
    "sequence_success_50": "walks missed (seen in < 50 % of frames)",
    "sequence_success_10": "walks missed (seen in < 10 % of frames)",
    "longest_run": "longest run seen, share of the walk",
    "track_recall": "track recall",
}


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def lines(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; numbers to the right."""
    body = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in body)


def between(value: dict[str, float], sign: str = "") -> str:
    """A mean and its interval."""
    return f"{value['mean']:{sign}.2f} ({value['low']:{sign}.2f} to {value['high']:{sign}.2f})"


def textures(found: dict[str, Any]) -> str:
    """Controls and modes of optimisation with their intervals."""
    rows = [[name, *(between(group[key]) for key in METRICS)] for name, group in found["intervals"].items()]
    return lines(["clothes", *METRICS.values()], rows)


def strengths(found: dict[str, Any]) -> str:
    """Whether textures of different strength are told apart, and on how many walks they all have one verdict."""
    told = found["separation"]
    rows = [
        [name, between(row["interval"]), between(row["within"]), between(row["step"], "+") if "step" in row else "–"]
        for name, row in told["strengths"].items()
    ]
    head = ["clothes", told["metric"], "without the walks' own differences", "stronger than the row above by"]
    return lines(head, rows) + "\n\n" + " ".join([apart(found), verdicts(found)])


def apart(found: dict[str, Any]) -> str:
    """Which intervals overlap, and how many walks would do."""
    told, results = found["separation"], found["results"]
    names, metric = list(told["strengths"]), told["metric"]
    groups = {name: textures_of(name, found) for name in names}
    each = {name: Interval(**told["strengths"][name]["interval"]) for name in names}
    inner = {name: Interval(**told["strengths"][name]["within"]) for name in names}
    pairs = [f"{a} and {b}" for a, b in itertools.combinations(names, 2) if each[a].apart(each[b])]
    close = [f"{a} and {b}" for a, b in itertools.pairwise(names) if not inner[a].apart(inner[b])]
    needed = [walks_needed(results, groups[a], groups[b], metric) for a, b in itertools.pairwise(names)]
    deviation = np.std(np.mean([results[t]["by_walk"][metric] for t in groups[names[-1]]], axis=0), ddof=1)
    return (
        f"Every step is {'above' if told['steps_above_zero'] else 'not above'} 0, walk by walk. Unpaired intervals of "
        f"the {metric} have nothing in common for {'; '.join(pairs) or 'no pair'}, and overlap for the other pairs; "
        f"without the walks' own differences neighbours overlap for {'; '.join(close) or 'no pair'}. Walks differ more "
        f"(deviation {deviation:.2f} under the strongest) than neighbours of this ladder: their unpaired intervals "
        f"would lie apart with about {', '.join(f'{n:,}' for n in needed)} walks."
    )


def textures_of(strength: str, found: dict[str, Any]) -> list[str]:
    """The textures of a row of the ladder of strengths: "sequence" is the one of all steps."""
    name = "sequence" if strength == f"{found['about']['spec']['steps']} steps" else strength
    return [t for t in found["same_verdict"]["textures"] if name in (t, t.rpartition("-")[0])]


def verdicts(found: dict[str, Any]) -> str:
    """On how many walks all textures of the ladder have one verdict, and why."""
    results, told = found["results"], found["same_verdict"]["textures"]
    recalls = np.array([results[name]["by_walk"]["recall"] for name in told])
    areas = np.array([results[name]["by_walk"]["area"] for name in told])
    falls = np.ptp(areas, axis=0)
    seen, missed = (recalls >= 0.5).all(axis=0), (recalls < 0.5).all(axis=0)
    same = seen | missed
    cuts = {cut: same_verdict(results, told, cut) for cut in (0.1, 0.25, 0.75, 0.9)}
    others = ", ".join(f"{share:.0%} at {cut:.0%}" for cut, share in cuts.items())
    few = [t for t in told if t == "plain" or t.startswith("sequence-")]
    return (
        f"On {same_verdict(results, told):.0%} of the walks all these {len(told)} textures have the same verdict "
        f"({seen.mean():.0%} seen by all in at least half of the frames, {missed.mean():.0%} missed by all, plain "
        f"clothes too); of plain and the strongest ones alone it is {same_verdict(results, few):.0%}. No other cut of "
        f"the verdict does much better ({others}). The verdict is what is coarse: on the walks with one verdict the "
        f"area still falls by {np.median(falls[same]):.2f} from the weakest to the strongest texture in the median "
        f"(all walks: {np.median(falls):.2f}), and by .05 or more on {(falls >= 0.05).mean():.0%} of all walks."
    )


def compared(tables: dict[str, Any]) -> str:
    """The gain of sequences over each baseline."""
    rows = []
    for baseline, table in tables.items():
        for key, title in METRICS.items():
            row = table[key]
            means = [between(row["mean"][mode]) for mode in (baseline, "sequence")]
            won = f"{row['seeds_won']} : {row['seeds_lost']}"
            rows.append([f"{baseline}: {title}", *means, between(row["gain"], "+"), won])
    return lines(["baseline: measure", "baseline", "sequence", "gain of sequence", "seeds won : lost"], rows)


def comparison(found: dict[str, Any]) -> str:
    """Without a defence."""
    return compared(found["sequence_against"])


def tracked(found: dict[str, Any]) -> str:
    """Behind aggregation over time."""
    return compared(found["behind_aggregation"])


def transfer(found: dict[str, Any]) -> str:
    """Area of each detector; the rows say what was optimised against."""
    table = found["transfer"]
    rows = [[name, *map(between, values)] for name, values in zip(table["rows"], table["area"], strict=True)]
    return lines(["clothes", *table["columns"]], rows) + f"\n\nOn {table['walks']} held-out walks."


def defences(found: dict[str, Any]) -> str:
    """What each defence restores and costs."""
    told = found["defences"]
    bare, plain = told["bare"][told["attack"]], told["bare"]["plain"]
    rows = [["none", number(bare["recall"]), *["–"] * 3, number(plain["recall"]), "–", number(plain["false_boxes"])]]
    for name, row in told["table"].items():
        each = row["intervals"]
        rows.append(
            [
                name,
                number(row["recall"]),
                between(each["recall_restored"], "+"),
                between(each["area_restored"], "+"),
                number(row.get("adaptive_recall")),
                between(each["clean_recall_change"], "+"),
                between(each["clean_ap50_change"], "+"),
                between(each["clean_false_boxes_change"], "+"),
            ]
        )
    head = ["defence", "recall", "recall restored", "area restored", "recall, attack knows"]
    clean = ["recall, plain: change", "AP50, plain: change", "false boxes per frame, plain: change"]
    return lines([*head, *clean], rows) + f"\n\nOn {told['walks']} held-out walks."


def bins(rows: dict[str, Any], titles: list[str]) -> str:
    """Confidence in bins, one row for each texture."""
    body = [
        [name, *("–" if cell["confidence"] is None else between(cell["confidence"]) for cell in row)]
        for name, row in rows.items()
    ]
    return lines(["clothes", *titles], body)


def azimuth(found: dict[str, Any]) -> str:
    """Mean confidence at eight sides."""
    sides = ["front", "front left", "left", "back left", "back", "back right", "right", "front right"]
    return bins(found["azimuth"], sides)


def distance(found: dict[str, Any]) -> str:
    """Mean confidence by how far the person is."""
    first = next(iter(found["distance"].values()))
    return bins(found["distance"], [f"{cell['from']:g} to {cell['to']:g} m" for cell in first])


def lights(found: dict[str, Any]) -> str:
    """Area under each light, and what the attack takes there, paired by walk."""
    told = found["lights"]
    lamps = list(told["walks"])
    rows = [["walks", *(str(told["walks"][lamp]) for lamp in lamps)]]
    rows += [[name, *(between(row[lamp]) for lamp in lamps)] for name, row in told["rows"].items()]
    rows += [[f"{name}: taken", *(between(row[lamp], "+") for lamp in lamps)] for name, row in told["taken"].items()]
    return lines([told["metric"], *lamps], rows)


def unseen(found: dict[str, Any]) -> str:
    """Recall on the walks of the optimisation, and on the held-out ones, and what 0.1.0 had."""
    rows = [
        [name, between(row["train"]), between(row["test"]), f"{row['gap']:+.2f}", f"{row['beyond_clean']:+.2f}"]
        for name, row in found["gaps"].items()
    ]
    head = [
        "clothes",
        "recall, walks of the optimisation",
        "recall, held-out walks",
        "gap",
        "beyond that of plain clothes",
    ]
    first = json.loads(FIRST.read_text(encoding="utf-8"))
    before = np.mean([first["results"][name]["recall"] - value for name, value in first["training_recall"].items()])
    now = [row["beyond_clean"] for name, row in found["gaps"].items() if name in MODES]
    sizes = [abs(row["gap"]) for name, row in found["gaps"].items() if name in MODES]
    return lines(head, rows) + (
        f"\n\nIn 0.1.0 optimised textures had {before:+.2f} more recall on held-out walks than on those of the "
        f"optimisation (mean of {len(first['training_recall'])}; plain clothes were not measured). Here the gap is at "
        f"most {max(sizes):.2f} in size, and what plain clothes do not have too is {min(now):+.2f} to {max(now):+.2f}."
    )


def conditions(found: dict[str, Any]) -> str:
    """How the figures came about, in a sentence."""
    about, spec = found["about"], found["about"]["spec"]
    seconds, seeds = about["processor_seconds"], about["seeds"]
    each = [seconds[f"{mode}-{seed}"] for mode in ("sequence", "frames", "static") for seed in seeds]
    frames = about["passes"]["sequence-0"]
    text = (
        f"{spec['detector']} attacked and defended; {', '.join(spec['others'])} for transfer and consensus. "
        f"{spec['train']} training walks, {spec['walks']} held-out ones of 4 to 8 s, {spec['fps']:g} frames per "
        f"second and {spec['size']} px, {len(seeds)} seeds, {spec['steps']} steps ({frames['backward']} passes with a "
        f"gradient in every mode, {frames['forward']} more without in mode sequence); weighting {spec['weighting']} of "
        f"{spec['window']} frames. drape {about['drape']}, torch {about['torch']}; an optimisation took "
        f"{sum(each) / len(each):.0f} seconds of one processor."
    )
    if "photograph_score" in found:
        photo = found["photograph_score"]
        text += (
            f" Fine-tuning in {spec['rounds']} rounds of {spec['harden_steps']} steps took {seconds['harden']:.0f} s; "
            f"the score of a photograph of a person that no step has seen is {number(photo['before'])} before and "
            f"{number(photo['hardened'])} after it."
        )
    return text


def scenes(found: dict[str, Any]) -> str:
    """What all walks keep to, from the file of `scenes.py`."""
    sets = {name: part["summary"] for name, part in json.loads(SCENES.read_text(encoding="utf-8")).items()}
    test, train = sets["test"], sets["train"]
    swung = {name: [f"{name}_rms_{which}_cm" for which in ("min", "median", "max")] for name in ("shirt", "trousers")}
    shown = {
        "walks, seconds": lambda s: f"{s['walks']}, {s['seconds']:.0f}",
        "soles that stand slide by, mean and worst, cm/s": lambda s: (
            f"{s['sliding_mean_cm_s']:.2f}, {s['sliding_worst_cm_s']:.1f}"
        ),
        "time in the air: least of a run, most of a walk": lambda s: (
            f"{s['flying_of_runs_least']:.0%}, {s['flying_of_walks_most']:.0%}"
        ),
        "deepest below the ground, cm": lambda s: f"{s['sunk_most_cm']:.1f}",
        **{
            f"hem of {name}, root mean square over a walk: least, median, most, cm": lambda s, keys=keys: ", ".join(
                f"{s[key]:.1f}" for key in keys
            )
            for name, keys in swung.items()
        },
        "contact shadow while a foot lies flat: least share of the sky hidden": lambda s: f"{s['shadow_least']:.2f}",
        "the same at the height of flights: most": lambda s: f"{s['shadow_flying_most']:.2f}",
        "from the soles to where that shadow is: most, cm": lambda s: f"{s['shadow_gap_worst_cm']:.1f}",
        "tightest turn, radius, m": lambda s: f"{s['turn_least_m']:.2f}",
    }
    return lines(["", "held-out walks", "training walks"], [[t, say(test), say(train)] for t, say in shown.items()])


def weights(found: dict[str, Any]) -> str:
    """Why weights over frames gain nothing, from the file of `weights.py`."""
    if not WEIGHTS.exists():
        return MISSING
    told = json.loads(WEIGHTS.read_text(encoding="utf-8"))
    summary, about = told["summary"], told["conditions"]
    head = ["texture", "frames", "weights of sequences come to", "of uniform", "weight in common",
            "cosine of both gradients", "one step with its own gradient: sequences", "uniform"]  # fmt: skip
    names = {"begin": "beginning", "sequence": "optimised over sequences", "frames": "optimised over single frames"}
    rows = [
        [names[kind], f"{row['frames']:.0f}", f"{row['effective_sequence']:.0f} frames",
         f"{row['effective_uniform']:.0f} frames", *(f"{row[key]:.2f}" for key in
         ("weight_in_common", "cosine", "step_sequence", "step_uniform"))]
        for kind, row in summary["textures"].items()
    ]  # fmt: skip
    turned = summary["flips"]["sequence"]
    return lines(head, rows) + (
        f"\n\nOn {about['walks']} training walks, means of {summary['seeds']} seeds. "
        f"{turned['frames']:.0%} of the frames are turned from found to missed by the optimisation over sequences; at "
        f"the beginning they have {turned['weight_sequence']:.0%} of its weight and {turned['weight_uniform']:.0%} of "
        f"the uniform one. How far a frame's confidence falls goes with its weight by a rank correlation of "
        f"{turned['rank_sequence']:+.2f} (uniform: {turned['rank_uniform']:+.2f})."
    )


def demo(found: dict[str, Any]) -> str:
    """How long the demo took, from the file that it wrote."""
    if not DEMO.exists():
        return MISSING
    took = json.loads(DEMO.read_text(encoding="utf-8"))
    return (
        f"It took {took['seconds']:.0f} seconds with {took['jobs']} processes on {took['cores']} cores "
        f"({took['processor_seconds']:.0f} of one; {took['machine']}), the detectors' weights not counted."
    )


# each table, and the part of the figures that it needs: a run may have been stopped before it
TABLES = {
    make.__name__: (make, needs)
    for make, needs in (
        (demo, None),
        (scenes, None),
        (conditions, None),
        (textures, None),
        (strengths, "separation"),
        (comparison, "sequence_against"),
        (weights, None),
        (tracked, "behind_aggregation"),
        (transfer, "transfer"),
        (defences, "defences"),
        (azimuth, "azimuth"),
        (distance, "distance"),
        (lights, "lights"),
        (unseen, "gaps"),
    )
}


def made(name: str, found: dict[str, Any]) -> str:
    """A table, or a note that it was not measured."""
    make, needs = TABLES[name]
    return make(found) if needs is None or found.get(needs) else MISSING


def filled(page: str, found: dict[str, Any] | None) -> str:
    """The page with its tables made again, or a note in their place without figures; an unknown marker is refused."""

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise SystemExit(f"error: no table {name!r}; known: {', '.join(TABLES)}.")
        return f"{match[1]}{MISSING if found is None else made(name, found)}\n{match[3]}"

    return BLOCK.sub(fill, page)


def main() -> None:
    found = json.loads(FIGURES.read_text(encoding="utf-8")) if FIGURES.exists() else None
    stale = []
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        new = filled(page, found)
        if new != page:
            stale.append(path.relative_to(ROOT))
            if "--check" not in sys.argv:
                write_text(path, new)
    if stale and "--check" in sys.argv:
        names = ", ".join(map(str, stale))
        raise SystemExit(f"error: {names} does not hold what the JSON says; run python drape/benchmarks/tables.py.")


if __name__ == "__main__":
    main()
