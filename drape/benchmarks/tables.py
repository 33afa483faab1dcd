"""The tables of drape/docs/drape.md, from drape/benchmarks/bench.json.

python drape/benchmarks/tables.py          write them between the pages' markers
python drape/benchmarks/tables.py --check  exit 1 if a page does not hold what the JSON file says
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from drape.io import write_text

ROOT = Path(__file__).resolve().parents[1]
MISSING = "Not measured yet with this edition."
FIGURES = ROOT / "benchmarks" / "bench.json"
DEMO = ROOT / "benchmarks" / "demo.json"
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
    verdict = (
        f"Intervals without the walks' own differences {'do not overlap' if told['apart'] else 'overlap'}; every step "
        f"is {'above' if told['steps_above_zero'] else 'not above'} 0. On {found['same_verdict']['walks']:.0%} of the "
        "walks all these textures have the same verdict."
    )
    return lines(head, rows) + "\n\n" + verdict


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
    """Recall on the walks of the optimisation, and on the held-out ones."""
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
    return lines(head, rows)


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


def demo(found: dict[str, Any]) -> str:
    """How long the demo took, from the file that it wrote."""
    if not DEMO.exists():
        return MISSING
    took = json.loads(DEMO.read_text(encoding="utf-8"))
    return (
        f"It took {took['seconds']:.0f} seconds ({took['processor_seconds']:.0f} of one processor; {took['machine']})."
    )


# each table, and the part of the figures that it needs: a run may have been stopped before it
TABLES = {
    make.__name__: (make, needs)
    for make, needs in (
        (demo, None),
        (conditions, None),
        (textures, None),
        (strengths, "separation"),
        (comparison, "sequence_against"),
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
