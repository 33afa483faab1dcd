"""The command line: `drape demo`, `drape optimise`, `drape evaluate`, `drape report`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import typer

from drape.controls import control, load_images, random_textures, save_images
from drape.detectors import load_detector
from drape.detectors.base import Detector
from drape.errors import AssetError, DrapeError
from drape.evaluate import detect_walk, evaluate, evaluate_defences, recovered
from drape.gamut import Gamut
from drape.optimise import OptimiseSpec, Scene, optimise
from drape.report import animation, page
from drape.scene.backgrounds import background
from drape.scene.light import light
from drape.scene.sequence import SequenceSpec, build_sequence

__all__ = ["app", "main"]

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
TRAIN = (("normal", "diagonal", "overcast", "coffee"), ("brisk", "circle", "indoor", "brick"))
TEST = (("stroll", "circle", "sun", "grass"),)  # gait, path, light and plate that no optimisation saw
NOTE = "Simulation only: rendered walks, public detectors. Scores are scaled so that 0.5 is the detector's threshold."

Detectors = typer.Option(["nanodet"], "--detector", help="repeat it for an ensemble")
Out = typer.Option(Path("out/drape"), help="folder for what is made")


def scenes(rows: tuple[tuple[str, str, str, str], ...], frames: int, size: int) -> list[Scene]:
    """Walks of (gait, path, light, background)."""
    return [
        Scene(
            f"{gait} {path} {lamp} {plate}",
            build_sequence(SequenceSpec(gait=gait, path=path, frames=frames, fps=6, size=size)),
            light(lamp),
            background(plate, size),
        )
        for gait, path, lamp, plate in rows
    ]


def gamut_of(icc: Path | None) -> Gamut:
    """The gamut of a profile, or the proxy."""
    return Gamut.proxy() if icc is None else Gamut.from_profile(icc)


def make_textures(
    detectors: list[Detector], walks: list[Scene], spec: OptimiseSpec, gamut: Gamut, out: Path
) -> dict[str, torch.Tensor]:
    """Optimise, keep textures and a record under `out`, and return the images that are evaluated."""
    textures = random_textures(gamut, spec.seed)
    run = optimise(textures, detectors, walks, spec)
    images = {name: texture(hard=True).detach() for name, texture in textures.items()}
    save_images(out / "textures.npz", images)
    record = {"gamut": gamut.name, "passes": run.passes, "confidence": run.confidence, "mode": spec.mode}
    (out / "optimise.json").write_text(json.dumps(record, indent=1))
    return images


def measure(
    images: dict[str, torch.Tensor], detector: Detector, others: list[Detector], walks: list[Scene], gamut: Gamut
) -> dict[str, Any]:
    """Plain, random and worst-case clothes without defence, and plain and worst-case ones behind every defence."""
    plain = control("plain", gamut)
    results = {"plain": evaluate(detector, walks, plain), "random": evaluate(detector, walks, control("random", gamut))}
    results["worst case"] = evaluate(detector, walks, images)
    clean = evaluate_defences(detector, walks, plain, others)
    defended = evaluate_defences(detector, walks, images, others)
    for name, row in defended.items():
        results[f"worst case, {name}"] = row
    lost = results["plain"]["recall"], results["worst case"]["recall"]
    costs = {
        name: {
            "recovered_recall": recovered(*lost, row["recall"]),
            "clean_ap50_loss": results["plain"]["ap50"] - clean[name]["ap50"],
        }
        for name, row in defended.items()
    }
    return {"detector": detector.name, "gamut": gamut.name, "results": results, "defences": costs}


def write_report(measured: dict[str, Any], images: dict[str, torch.Tensor], detector: Detector, out: Path) -> None:
    """`report.html` under `out` from what `measure` gave, with the first walk as video."""
    size, frames = measured["size"], measured["frames"]
    walk = scenes(TEST, frames, size)[0]
    videos = {}
    for caption, textures in (("plain", control("plain", Gamut.proxy())), ("worst case", images)):
        found = detect_walk(detector, walk, textures)
        boxes = [d.boxes[0] if len(d.scores) and float(d.scores[0]) >= 0.5 else None for d in found]
        videos[f"{caption} (a box where {detector.name} sees a person)"] = animation(walk.render(textures), boxes)
    note = f"{NOTE} Colours: {measured['gamut']}. Defences: {json.dumps(measured['defences'])}"
    (out / "report.html").write_text(page(f"drape: {detector.name}", note, measured["results"], videos))


@app.command("optimise")
def optimise_command(
    detector: list[str] = Detectors,
    mode: str = typer.Option("sequence", help="sequence, or the control: frames"),
    steps: int = typer.Option(60),
    frames: int = typer.Option(12, help="frames a walk"),
    size: int = typer.Option(416, help="side of a frame in pixels"),
    icc: Path | None = typer.Option(None, help="ICC profile of a printer; without one a proxy gamut is used"),
    seed: int = typer.Option(0),
    out: Path = Out,
) -> None:
    """Find worst-case textures for detectors on the training walks."""
    walks = scenes(TRAIN, frames, size)
    spec = OptimiseSpec(mode=mode, steps=steps, seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    make_textures([load_detector(name) for name in detector], walks, spec, gamut_of(icc), out)
    typer.echo(f"wrote {out / 'textures.npz'}; go on with: drape evaluate --out {out}")


@app.command("evaluate")
def evaluate_command(
    detector: list[str] = Detectors,
    frames: int = typer.Option(12, help="frames a walk"),
    size: int = typer.Option(416, help="side of a frame in pixels"),
    icc: Path | None = typer.Option(None, help="the profile that the textures were made with"),
    out: Path = Out,
) -> None:
    """Judge the textures on held-out walks, without and with defences; further detectors join the consensus."""
    images = load_images(out / "textures.npz")
    first, *others = [load_detector(name) for name in detector]
    measured = measure(images, first, others, scenes(TEST, frames, size), gamut_of(icc))
    path = out / "evaluate.json"
    path.write_text(json.dumps({**measured, "frames": frames, "size": size}, indent=1))
    typer.echo(f"wrote {path}; go on with: drape report --out {out}")


@app.command("report")
def report_command(out: Path = Out) -> None:
    """Write report.html from what optimise and evaluate left in the folder."""
    path = out / "evaluate.json"
    if not path.is_file():
        raise AssetError(f"{path} does not exist; run `drape evaluate --out {out}` first.")
    measured = json.loads(path.read_text())
    write_report(measured, load_images(out / "textures.npz"), load_detector(measured["detector"]), out)
    typer.echo(f"wrote {out / 'report.html'}")


@app.command("demo")
def demo_command(
    detector: str = typer.Option("nanodet"),
    steps: int = typer.Option(30),
    frames: int = typer.Option(8, help="frames a walk"),
    size: int = typer.Option(416, help="side of a frame in pixels"),
    out: Path = Out,
) -> None:
    """All three steps, small: a walking person seen by a real detector before and after, and behind defences."""
    optimise_command([detector], "sequence", steps, frames, size, None, 0, out)
    evaluate_command([detector], frames, size, None, out)
    report_command(out)


def main() -> None:
    """Run the command line; errors of drape are shown as one line."""
    try:
        app()
    except DrapeError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
