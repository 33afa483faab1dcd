"""Everything that a report shows, as one value for JSON: controls, attacks, transfer, curves and defences."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from drape.compare import defence_cost
from drape.detectors.base import Detection
from drape.errors import ConfigError
from drape.evaluate import FOUND, Judge, Subject, defended, light_curve, recovered
from drape.metrics import transfer_matrix
from drape.scene.scene import Scene

__all__ = ["CLEAN", "Attacks", "defence_row", "defence_table", "measure", "track"]

CLEAN = "plain"  # the control that recall is lost against
Textures = Mapping[str, Tensor]


@dataclass(frozen=True)
class Attacks:
    """Textures by name.

    Args:
        controls: with "plain" among them.
        attacks: the first one is what defences are measured against.
        adaptive: by defence, textures that were optimised through it.
    """

    controls: Mapping[str, Textures]
    attacks: Mapping[str, Textures]
    adaptive: Mapping[str, Textures] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if CLEAN not in self.controls or not self.attacks:
            raise ConfigError(f'give the control "{CLEAN}" and at least one attack.')
        shared = set(self.controls) & set(self.attacks)
        if shared:
            raise ConfigError(f"{sorted(shared)} name both a control and an attack; rename the attack.")

    def textures(self) -> dict[str, Textures]:
        """Controls and attacks by name."""
        return {**self.controls, **self.attacks}


def defence_row(clean: dict[str, Any], attacked: dict[str, Any], rows: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What a defence is worth, and what it costs.

    Args:
        clean, attacked: metrics without defence.  rows: metrics behind it: "clean", "attacked", and "adaptive", the
            texture that was optimised through it, if there is one.
    """
    lost = clean["recall"], attacked["recall"]
    row = {
        "recall": rows["attacked"]["recall"],
        "recovered_recall": recovered(*lost, rows["attacked"]["recall"]),
        "clean_recall": rows["clean"]["recall"],
        "clean_ap50_loss": clean["ap50"] - rows["clean"]["ap50"],
        "clean_false_boxes": rows["clean"]["false_boxes"],
        "attacked_false_boxes": rows["attacked"]["false_boxes"],
        "attacked_ap50": rows["attacked"]["ap50"],
    }
    if "adaptive" in rows:
        row["adaptive_recall"] = rows["adaptive"]["recall"]
        row["recovered_recall_adaptive"] = recovered(*lost, rows["adaptive"]["recall"])
    return row


def defence_table(judge: Judge, subject: Subject, given: Attacks) -> dict[str, dict[str, Any]]:
    """`defence_row` of each defence that the subject has, against the first attack, with the attack's confidences over
    each walk, and what it restores and costs walk by walk, with intervals (`drape.compare.defence_cost`).
    """
    worst, images = next(iter(given.attacks.items()))
    clean = judge.result(subject.detector, CLEAN, given.controls[CLEAN])
    attacked = judge.result(subject.detector, worst, images)
    table = {}
    for defence in subject.defences():
        rows = {
            "clean": defended(judge, subject, defence, CLEAN, given.controls[CLEAN]),
            "attacked": defended(judge, subject, defence, worst, images),
        }
        if defence in given.adaptive:
            name = f"adaptive: {defence}"
            rows["adaptive"] = defended(judge, subject, defence, name, given.adaptive[defence])
        bare, behind = {CLEAN: clean, worst: attacked}, {CLEAN: rows["clean"], worst: rows["attacked"]}
        table[defence] = {
            **defence_row(clean, attacked, rows),
            "curves": rows["attacked"]["curves"],
            "intervals": defence_cost(bare, behind, CLEAN, worst),
        }
    return table


def track(walk: Sequence[Detection]) -> list[list[float] | None]:
    """The best box of each frame if it is sure enough, for the video."""
    return [[float(v) for v in d.boxes[0]] if len(d.scores) and float(d.scores[0]) >= FOUND else None for d in walk]


def measure(
    subject: Subject,
    judge: Judge,
    given: Attacks,
    transferred: Collection[str] | None = None,
    lit: Sequence[Scene] = (),
) -> dict[str, Any]:
    """All figures of a report.

    Args:
        transferred: the attacks that other detectors look at too; all if not given.
        lit: one walk under several lights, for the curve over lights; there is none without.

    Returns:
        seen_least: the texture, control or attack, with the least area.
        results: metrics by texture.  transfer: recall by texture and detector.  defences: `defence_table`.
        lights: mean confidence by texture and light.  video: boxes on the first walk, by texture.
    """
    textures = given.textures()
    results = {name: judge.result(subject.detector, name, images) for name, images in textures.items()}
    recalls = {
        name: {d.name: judge.result(d, name, images)["recall"] for d in (subject.detector, *subject.others)}
        for name, images in textures.items()
        if transferred is None or name in given.controls or name in transferred
    }
    rows, columns, table = transfer_matrix(recalls)
    worst = next(iter(given.attacks))
    shown = (CLEAN, worst)
    return {
        "detector": subject.detector.name,
        "attack": worst,
        "seen_least": min(results, key=lambda name: (results[name]["area"], name in given.controls, name)),
        "results": results,
        "transfer": {"rows": rows, "columns": columns, "recall": table.tolist()},
        "defences": defence_table(judge, subject, given),
        "lights": {name: light_curve(subject.detector, lit, textures[name]) for name in shown if lit},
        "video": {name: track(judge.walks(subject.detector, name, textures[name])[0]) for name in shown},
    }
