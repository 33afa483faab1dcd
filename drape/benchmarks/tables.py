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
    """Controls and modes of optimisation with their intervals, and how many walks have more than one verdict."""
    rows = [[name, *(between(group[key]) for key in METRICS)] for name, group in found["intervals"].items()]
    undecided = f"On {found['undecided_walks']:.0%} of the walks the verdict depends on the texture."
    return lines(["clothes", *METRICS.values()], rows) + "\n\n" + undecided


def compared(tables: dict[str, Any]) -> str:
    """The gain of sequences over each baseline."""
    rows = []
    for baseline, table in tables.items():
        for key, title in METRICS.items():
            row = table[key]
            means = [between(row["mean"][mode]) for mode in (baseline, "sequence")]
            won = f"{row['seeds_won']} : {row['seeds_lost']}"
            rows.append([f"{baseline}: {title}", *means, between(row["gain_of_sequence"], "+"), won])
    return lines(["baseline: measure", "baseline", "sequence", "gain of sequence", "seeds won : lost"], rows)


def comparison(found: dict[str, Any]) -> str:
    """Without a defence."""
    return compared(found["sequence_against"])


def tracked(found: dict[str, Any]) -> str:
    """Behind aggregation over time; the one over sequences knew of it."""
    return compared(found["behind_aggregation"])


def transfer(found: dict[str, Any]) -> str:
    """Recall of each detector."""
    table = found["transfer"]
    rows = [[name, *(number(v) for v in values)] for name, values in zip(table["rows"], table["recall"], strict=True)]
    return lines(["clothes", *table["columns"]], rows)


def defences(found: dict[str, Any]) -> str:
    """What each defence restores and costs."""
    bare, plain = found["results"][found["attack"]], found["results"]["plain"]
    none = [number(bare["recall"]), *[number(None)] * 3, number(plain["recall"]), number(None)]
    rows = [["none", *none, number(plain["false_boxes"])]]
    for name, row in found["defences"].items():
        rows.append(
            [
                name,
                number(row["recall"]),
                number(row["recovered_recall"]),
                number(row.get("adaptive_recall")),
                number(row.get("recovered_recall_adaptive")),
                number(row["clean_recall"]),
                f"{row['clean_ap50_loss']:.3f}",
                number(row["clean_false_boxes"]),
            ]
        )
    head = ["defence", "recall", "lost recall restored", "recall, attack knows"]
    return lines(
        [*head, "restored, attack knows", "recall, plain", "AP50 lost, plain", "false boxes per frame, plain"], rows
    )


def seeds(found: dict[str, Any]) -> str:
    """Recall under each seed's worst case, bare and behind defences, and the share restored, over all seeds."""
    count = found["about"]["spec"]["seeds"]
    bare = [found["results"][f"sequence-{seed}"]["recall"] for seed in range(count)]
    clean = found["results"]["plain"]["recall"]
    rows = [["none", *map(number, bare), number(None)]]
    for name, values in found["defended_by_seed"].items():
        restored, lost = sum(values) - sum(bare), clean * count - sum(bare)
        rows.append([name, *map(number, values), number(restored / lost if abs(lost) > 1e-9 else None)])
    return lines(["defence", *(f"seed {seed}" for seed in range(count)), "lost recall restored, all seeds"], rows)


def shown(found: dict[str, Any]) -> tuple[str, str]:
    return "plain", found["attack"]


def azimuth(found: dict[str, Any]) -> str:
    """Mean confidence at eight sides."""
    sides = {"front": "0", "front left": "40", "left": "90", "back left": "140", "back": "180"}
    sides |= {"back right": "220", "right": "270", "front right": "320"}
    rows = [[name, *(number(found["results"][name]["azimuth"][at]) for at in sides.values())] for name in shown(found)]
    return lines(["clothes", *sides], rows)


def lights(found: dict[str, Any]) -> str:
    """Mean confidence under each light, on the first walk."""
    rows = [[name, *(number(v) for v in found["lights"][name].values())] for name in shown(found)]
    return lines(["clothes", *found["lights"]["plain"]], rows)


def unseen(found: dict[str, Any]) -> str:
    """Recall on the walks of the optimisation, and on the held-out ones."""
    rows = [
        [name, number(value), number(found["results"][name]["recall"])]
        for name, value in found["training_recall"].items()
    ]
    return lines(["texture", "recall, walks of the optimisation", "recall, held-out walks"], rows)


def conditions(found: dict[str, Any]) -> str:
    """How the figures came about, in a sentence."""
    about, spec = found["about"], found["about"]["spec"]
    seconds, photo = about["processor_seconds"], found["photograph_score"]
    each = [seconds[f"{mode}-{seed}"] for mode in ("sequence", "frames", "static") for seed in range(spec["seeds"])]
    frames, steps = about["passes"]["sequence-0"], f"{spec['steps']} steps"
    return (
        f"{spec['detector']} attacked and defended; {', '.join(spec['others'])} in no optimisation. "
        f"{spec['train']} training walks, {spec['walks']} held-out ones of 4 to 8 s, {spec['fps']:g} frames per second "
        f"and {spec['size']} px, {spec['seeds']} seeds, {steps} ({frames['backward']} frames with a gradient in every "
        f"mode, {frames['forward']} more without in mode sequence); weighting {spec['weighting']} of {spec['window']} "
        f"frames; fine-tuning in {spec['rounds']} rounds of {spec['harden_steps']} steps. drape {about['drape']}, "
        f"torch {about['torch']}; an optimisation took {sum(each) / len(each):.0f} seconds of one processor, "
        f"fine-tuning {seconds['harden']:.0f}. Score of a photograph of a person that no step has "
        f"seen: {number(photo['before'])} before fine-tuning, {number(photo['hardened'])} after."
    )


def demo(found: dict[str, Any]) -> str:
    """How long the demo took, from the file that it wrote on an empty cache."""
    if not DEMO.exists():
        return MISSING
    took = json.loads(DEMO.read_text(encoding="utf-8"))
    return (
        f"From an empty cache, the download included, it took {took['seconds']:.0f} seconds "
        f"({took['processor_seconds']:.0f} of one processor; {took['machine']})."
    )


TABLES = {
    make.__name__: make
    for make in (demo, textures, comparison, tracked, transfer, defences, seeds, azimuth, lights, unseen, conditions)
}


def filled(page: str, found: dict[str, Any] | None) -> str:
    """The page with its tables made again, or a note in their place without figures; an unknown marker is refused."""

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise SystemExit(f"error: no table {name!r}; known: {', '.join(TABLES)}.")
        made = MISSING if found is None else TABLES[name](found)
        return f"{match[1]}{made}\n{match[3]}"

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
