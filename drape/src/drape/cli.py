"""The command line: `drape demo`, `optimise`, `harden`, `evaluate`, `report` and `bench`."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image

from drape import progress
from drape.bench import REACH, BenchSpec, rounded, run_bench
from drape.cache import write_text
from drape.controls import CONTROLS, control, load_images, product_textures, random_textures, save_images
from drape.defences import Purified
from drape.detectors import detectors, load_detector
from drape.detectors.base import Detector
from drape.errors import AssetError, ConfigError, DrapeError, unknown
from drape.evaluate import Judge, Subject
from drape.gamut import Gamut
from drape.harden import HardenSpec, harden, load_hardened, save_hardened
from drape.measure import Attacks, measure
from drape.objective import Temporal
from drape.optimise import OptimiseSpec, optimise
from drape.report import animation, page
from drape.scene.cloth import ENGINES
from drape.walks import TEST, TRAIN, scenes

__all__ = ["app", "main"]

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
NOTE = "Simulation only: rendered walks, public detectors. Scores are scaled so that 0.5 is the detector's threshold."
KNOWN = ("none", "aggregate", "median", "hardened", "hardened+aggregate")  # defences that an attack can know of
WINDOWS = 3  # that fit into a walk, of those that the weighting "window" looks at

Detectors = typer.Option(["nanodet"], "--detector", help="repeat it for an ensemble")
Out = typer.Option(Path("out/drape"), help="folder for what is made")
Frames = typer.Option(12, help="frames a walk")
Size = typer.Option(416, help="side of a frame in pixels")
Profile = typer.Option(None, help="ICC profile of a printer; without one a proxy gamut is used")
Engine = typer.Option("drape", "--cloth", help="what moves the cloth: " + " or ".join(ENGINES))
Weights = typer.Option(None, help="weights that `drape harden` wrote")
Walks = typer.Option(len(TEST), min=1, max=len(TEST), help="how many of the held-out walks")


def gamut_of(icc: Path | None) -> Gamut:
    """The gamut of a profile, or the proxy."""
    return Gamut.proxy() if icc is None else Gamut.from_profile(icc)


def picture_of(path: Path) -> NDArray[np.uint8]:
    """A picture file as RGB."""
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise AssetError(f"{path} cannot be read as a picture ({error}); give a PNG or JPEG file.") from error


def attacked_through(defence: str, detectors: Sequence[Detector], hardened: Path | None) -> tuple[list[Detector], int]:
    """The detectors that an attack which knows of a defence is optimised against, and the aggregation it knows of."""
    if defence not in KNOWN:
        raise unknown("defence to attack", defence, KNOWN)
    reach = REACH if defence.endswith("aggregate") else 0
    if defence.startswith("hardened"):
        if hardened is None:
            raise ConfigError(f"--against {defence} needs --hardened FILE, made with `drape harden`.")
        return [load_hardened(hardened)], reach
    return [Purified(d) for d in detectors] if defence == "median" else list(detectors), reach


@app.command("optimise")
def optimise_command(
    detector: list[str] = Detectors,
    mode: str = typer.Option("sequence", help="sequence, or the control: frames"),
    weighting: str = typer.Option("window", help="of the frames: uniform, hard, window or curriculum"),
    steps: int = typer.Option(60),
    frames: int = Frames,
    size: int = Size,
    engine: str = Engine,
    icc: Path | None = Profile,
    against: str = typer.Option("none", help="the defence that the attack knows of: " + ", ".join(KNOWN)),
    hardened: Path | None = Weights,
    product: Path | None = typer.Option(None, help="picture of a cloth to begin from and to stay like"),
    seed: int = typer.Option(0),
    out: Path = Out,
) -> None:
    """Find worst-case textures for detectors on the training walks."""
    gamut = gamut_of(icc)
    models, reach = attacked_through(against, [load_detector(name) for name in detector], hardened)
    temporal = Temporal(mode=weighting, window=max(frames // WINDOWS, 1))
    spec = OptimiseSpec(mode=mode, steps=steps, seed=seed, aggregation=reach, temporal=temporal)
    textures, labels = random_textures(gamut, seed), None
    if product is not None:
        textures, labels = product_textures(gamut, picture_of(product), seed)
    run = optimise(textures, models, scenes(TRAIN, frames, size, engine), spec, labels)
    save_images(out / "textures.npz", {name: texture(hard=True).detach() for name, texture in textures.items()})
    record = {"gamut": gamut.name, "passes": run.passes, "confidence": run.confidence, "mode": mode, "against": against}
    write_text(out / "optimise.json", json.dumps(rounded(record), indent=1))
    typer.echo(f"wrote {out / 'textures.npz'}; go on with: drape evaluate --out {out}")


@app.command("harden")
def harden_command(
    detector: str = typer.Option("nanodet"),
    rounds: int = typer.Option(HardenSpec.rounds, help="of attack and fine-tuning"),
    attack_steps: int = typer.Option(HardenSpec.attack_steps, help="of each round's textures"),
    steps: int = typer.Option(HardenSpec.steps, help="of each round's fine-tuning"),
    frames: int = Frames,
    size: int = Size,
    engine: str = Engine,
    icc: Path | None = Profile,
    to: Path = typer.Option(Path("out/hardened.npz"), help="file for the changed weights"),
) -> None:
    """Fine-tune a detector on worst-case and clean walks, as a defence."""
    spec = HardenSpec(rounds=rounds, attack_steps=attack_steps, steps=steps)
    attack = OptimiseSpec(temporal=Temporal(window=max(frames // WINDOWS, 1)))
    done = harden(load_detector(detector), scenes(TRAIN, frames, size, engine), gamut_of(icc), spec, attack)
    save_hardened(to, done.detector, detector, spec)
    typer.echo(f"wrote {to}; go on with: drape evaluate --hardened {to}")


@app.command("evaluate")
def evaluate_command(
    detector: list[str] = Detectors,
    frames: int = Frames,
    size: int = Size,
    engine: str = Engine,
    icc: Path | None = Profile,
    walks: int = Walks,
    hardened: Path | None = Weights,
    compare: list[str] = typer.Option([], help="NAME=FOLDER, further textures; repeat it"),
    adaptive: list[str] = typer.Option([], help="DEFENCE=FOLDER, textures made with --against DEFENCE; repeat it"),
    out: Path = Out,
) -> None:
    """Judge textures on held-out walks, with controls and defences; further detectors join transfer and consensus."""
    gamut = gamut_of(icc)
    first, *others = [load_detector(name) for name in detector]
    subject = Subject(first, others, None if hardened is None else load_hardened(hardened))
    given = Attacks(
        {kind: control(kind, gamut) for kind in CONTROLS},
        {"worst case": load_images(out / "textures.npz"), **named_textures(compare)},
        named_textures(adaptive),
    )
    measured = measure(subject, Judge(scenes(TEST[:walks], frames, size, engine)), given)
    path = out / "evaluate.json"
    scene = {"gamut": gamut.name, "icc": icc and str(icc), "frames": frames, "size": size, "cloth": engine}
    write_text(path, json.dumps(rounded({**measured, **scene}), indent=1))
    typer.echo(f"wrote {path}; go on with: drape report --out {out}")


def named_textures(pairs: Sequence[str]) -> dict[str, dict[str, torch.Tensor]]:
    """Textures of folders by name, from NAME=FOLDER."""
    result = {}
    for pair in pairs:
        name, sign, folder = pair.partition("=")
        if not name or not sign or not folder:
            raise ConfigError(f"{pair!r}; expected NAME=FOLDER, such as frames=out/b.")
        result[name] = load_images(Path(folder) / "textures.npz")
    return result


def read_figures(path: Path) -> dict[str, Any]:
    """What `drape evaluate` wrote, or an `AssetError` that names the file."""
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AssetError(f"{path} cannot be read ({error}); run `drape evaluate` again.") from error
    missing = {
        "detector",
        "attack",
        "gamut",
        "results",
        "defences",
        "transfer",
        "lights",
        "video",
        "frames",
        "size",
        "cloth",
        "icc",
    } - set(figures)
    if missing:
        raise AssetError(f"{path} has no {', '.join(sorted(missing))}; run `drape evaluate` again.")
    return dict(figures)


@app.command("report")
def report_command(out: Path = Out) -> None:
    """Write report.html from what optimise and evaluate left in the folder; no detector is needed."""
    path = out / "evaluate.json"
    if not path.is_file():
        raise AssetError(f"{path} does not exist; run `drape evaluate --out {out}` first.")
    measured = read_figures(path)
    walk = scenes(TEST[:1], measured["frames"], measured["size"], measured["cloth"])[0]
    gamut = gamut_of(measured["icc"] and Path(measured["icc"]))
    clothes = {"plain": control("plain", gamut), "worst case": load_images(out / "textures.npz")}
    videos = {
        f"{name} (a box where {measured['detector']} sees a person)": animation(walk.render(clothes[name]), boxes)
        for name, boxes in measured["video"].items()
    }
    write_text(out / "report.html", page(measured, videos, f"{NOTE} Colours: {measured['gamut']}."))
    typer.echo(f"wrote {out / 'report.html'}")


@app.command("demo")
def demo_command(
    detector: str = typer.Option("nanodet"),
    steps: int = typer.Option(50),
    frames: int = typer.Option(12, help="frames a walk"),
    size: int = Size,
    out: Path = Out,
) -> None:
    """All three steps, small: a walking person seen by a real detector before and after, and behind defences."""
    start = time.perf_counter(), time.process_time()
    optimise_command([detector], "sequence", "window", steps, frames, size, "drape", None, "none", None, None, 0, out)
    evaluate_command([detector], frames, size, "drape", None, 2, None, [], [], out)
    report_command(out)
    seconds = {"seconds": time.perf_counter() - start[0], "processor_seconds": time.process_time() - start[1]}
    machine = f"{platform.machine()}, {torch.get_num_threads()} thread(s)"
    write_text(out / "demo.json", json.dumps(rounded({**seconds, "machine": machine}, 1)) + "\n")
    typer.echo(f"the demo took {seconds['seconds']:.0f} seconds")


@app.command("bench")
def bench_command(
    detector: str = typer.Option(BenchSpec.detector, help="the one that is attacked and defended"),
    to: Path = typer.Option(Path("benchmarks/drape-bench.json"), help="where the figures go"),
    work: Path = typer.Option(Path("out/drape-bench"), help="folder for textures and weights; a second run goes on"),
    seeds: int = typer.Option(BenchSpec.seeds, help="of the comparison of sequence and frames"),
    steps: int = typer.Option(BenchSpec.steps, help="of each optimisation"),
    frames: int = typer.Option(BenchSpec.frames, help="frames a walk"),
    size: int = Size,
    walks: int = Walks,
) -> None:
    """Measure: sequence against frames at equal compute, transfer, defences and attacks that know of them."""
    others = tuple(name for name in detectors() if name != detector)
    spec = BenchSpec(detector=detector, others=others, seeds=seeds, steps=steps, frames=frames, size=size, walks=walks)
    run_bench(spec, work, to)
    typer.echo(f"wrote {to}")


def main() -> None:
    """Run the command line; errors of drape are shown as one line."""
    progress.show()
    try:
        app()
    except DrapeError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
