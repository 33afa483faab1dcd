"""The command line: `drape demo`, `optimise`, `harden`, `evaluate`, `report` and `bench`."""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from drape import progress
from drape.arguments import TEXTURES, limits_of, named_products, named_textures
from drape.bench import REACH, BenchSpec, rounded, run_bench, versions
from drape.controls import CONTROLS, control, load_images, product_textures, random_textures, save_images
from drape.defences import Purified
from drape.detectors import detectors, load_detector
from drape.detectors.base import Detector
from drape.errors import ConfigError, DrapeError, unknown
from drape.evaluate import DEFENCES, Judge, Subject, check_names
from drape.gamut import Gamut
from drape.harden import HardenSpec, check_trainable, harden, load_hardened, save_hardened
from drape.io import check_output, load_record, save_record, write_text
from drape.libraries import library_metrics
from drape.measure import CLEAN, Attacks, measure
from drape.objective import WEIGHTINGS, Temporal
from drape.optimise import OptimiseSpec, optimise
from drape.own import own_scenes, read_walks
from drape.parallel import end_workers
from drape.report import animation, page
from drape.scene.cloth import ENGINES
from drape.walks import TEST, TRAIN, Walk, scenes, under_lights

__all__ = ["app", "main"]

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
NOTE = "Simulation only: rendered walks, public detectors. Scores are scaled so that 0.5 is the detector's threshold."
KNOWN = ("none", "aggregate", "median", "hardened", "hardened+aggregate")  # defences that an attack can know of
OPTIMISED = "optimised"  # what reports call the textures of `drape optimise`; a control may hide more
FIGURES, EVALUATION = "evaluate.json", "drape's evaluation"
MADE, OPTIMISATION = "optimise.json", "drape's optimisation"
FAILED = 3  # exit code of an evaluation below a limit
WINDOW = 1.5  # seconds, of the weighting "window"


def known_engine(name: str) -> str:
    """The name of a cloth engine, refused before any work if there is none."""
    if name not in ENGINES:
        raise unknown("cloth engine", name, ENGINES)
    return name


Detectors = typer.Option(["nanodet"], "--detector", help="repeat it for an ensemble")
Out = typer.Option(Path("out/drape"), help="folder for what is made")
Fps = typer.Option(3.0, min=0.25, max=60, help="frames per second of the walks, which take 4 to 8 seconds")
Size = typer.Option(416, min=16, max=2048, help="side of a frame in pixels")
Profile = typer.Option(None, help="ICC profile of a printer; without one a proxy gamut is used")
Engine = typer.Option("drape", "--cloth", help="what moves the cloth: " + " or ".join(ENGINES), callback=known_engine)
Weights = typer.Option(None, help="weights that `drape harden` wrote")
Train = typer.Option(len(TRAIN), "--train-walks", min=1, max=len(TRAIN), help="how many of the training walks")
Walks = typer.Option(len(TEST), min=1, max=len(TEST), help="how many of the held-out walks")
Own = typer.Option(None, "--walk-file", help="JSON file of walks of your own, in place of the held-out ones")
Plates = typer.Option(
    [], "--plate", help="image, clip or folder of images behind the walks; repeat it, they take turns"
)
Jobs = typer.Option(1, min=1, max=256, help="processes side by side, with one thread each")
Rendering = typer.Option(1, "--jobs", min=1, max=256, help="processes that render walks side by side")


def gamut_of(icc: Path | None) -> Gamut:
    """The gamut of a profile, or the proxy."""
    return Gamut.proxy() if icc is None else Gamut.from_profile(icc)


def attacked_through(defence: str, names: Sequence[str], hardened: Path | None) -> list[Detector]:
    """The detectors that an attack which knows of a defence of `KNOWN` is optimised against."""
    if defence.startswith("hardened"):
        if hardened is None:
            raise ConfigError(f"--against {defence} needs --hardened FILE, made with `drape harden`.")
        return [load_hardened(hardened, names[0])]
    detectors = [load_detector(name) for name in names]
    check_names(detectors)
    return [Purified(d) for d in detectors] if defence == "median" else detectors


@app.command("optimise")
def optimise_command(
    detector: list[str] = Detectors,
    mode: str = typer.Option("sequence", help="sequence, or a baseline without sequences: frames, static"),
    weighting: str = typer.Option("window", help="of the frames: " + ", ".join(WEIGHTINGS)),
    steps: int = typer.Option(60),
    fps: float = Fps,
    size: int = Size,
    engine: str = Engine,
    train: int = Train,
    icc: Path | None = Profile,
    against: str = typer.Option("none", help="the defence that the attack knows of: " + ", ".join(KNOWN)),
    hardened: Path | None = Weights,
    product: list[str] = typer.Option(
        [], help="FILE, an image of cloth to begin from and to stay like, or GARMENT=FILE, one of a garment; repeat it"
    ),
    seed: int = typer.Option(0, min=0, max=2**32 - 1),
    jobs: int = Rendering,
    out: Path = Out,
) -> None:
    """Find worst-case textures for detectors on the training walks."""
    check_output(out / TEXTURES)
    if against not in KNOWN:
        raise unknown("defence to attack", against, KNOWN)
    gamut, reach = gamut_of(icc), REACH if against.endswith("aggregate") else 0
    temporal = Temporal(mode=weighting, window=max(round(WINDOW * fps), 1))
    spec = OptimiseSpec(mode=mode, steps=steps, seed=seed, aggregation=reach, temporal=temporal)
    textures, labels = random_textures(gamut, seed), None
    if product:
        textures, labels = product_textures(gamut, named_products(product), seed)
    models = attacked_through(against, detector, hardened)
    run = optimise(textures, models, scenes(TRAIN[:train], fps, size, engine, jobs), spec, labels)
    if run.saw_nobody:
        names = ", ".join(detector)
        typer.echo(f"warning: {names} saw the person in no frame: these textures are as good as random", err=True)
    save_images(out / TEXTURES, {name: texture(hard=True).detach() for name, texture in textures.items()})
    record = {
        "detectors": list(detector),
        "gamut": gamut.name,
        "backward": run.backward,
        "forward": run.forward,
        "confidence": run.confidence,
        "against": against,
        "spec": asdict(spec),
        **versions(),
    }
    save_record(out / MADE, OPTIMISATION, rounded(record))
    typer.echo(f"wrote {out / TEXTURES}; go on with: drape evaluate --out {out}")


@app.command("harden")
def harden_command(
    detector: str = typer.Option("nanodet"),
    rounds: int = typer.Option(HardenSpec.rounds, help="of attack and fine-tuning"),
    attack_steps: int = typer.Option(HardenSpec.attack_steps, help="of each round's textures"),
    steps: int = typer.Option(HardenSpec.steps, help="of each round's fine-tuning"),
    fps: float = Fps,
    size: int = Size,
    engine: str = Engine,
    train: int = Train,
    icc: Path | None = Profile,
    jobs: int = Rendering,
    to: Path = typer.Option(Path("out/hardened.npz"), help="file for the changed weights"),
) -> None:
    """Fine-tune a detector on worst-case and clean walks, as a defence."""
    check_output(to, ".npz")
    spec = HardenSpec(rounds=rounds, attack_steps=attack_steps, steps=steps)
    attack = OptimiseSpec(temporal=Temporal(window=max(round(WINDOW * fps), 1)))
    model, gamut = load_detector(detector), gamut_of(icc)
    check_trainable(model)
    done = harden(model, scenes(TRAIN[:train], fps, size, engine, jobs), gamut, spec, attack)
    save_hardened(to, done.detector, detector, spec)
    typer.echo(f"wrote {to}; go on with: drape evaluate --hardened {to}")


@app.command("evaluate")
def evaluate_command(
    detector: list[str] = Detectors,
    fps: float = Fps,
    size: int = Size,
    engine: str = Engine,
    icc: Path | None = Profile,
    walks: int | None = typer.Option(
        None, min=1, max=len(TEST), help=f"how many held-out walks, {len(TEST)} if not given"
    ),
    hardened: Path | None = Weights,
    compare: list[str] = typer.Option([], help="NAME=FOLDER, further textures; repeat it"),
    adaptive: list[str] = typer.Option([], help="DEFENCE=FOLDER, textures made with --against DEFENCE; repeat it"),
    fail_under: list[str] = typer.Option(
        [], help="MEASURE=VALUE under the optimised textures, such as recall=0.6; repeat it"
    ),
    lights: bool = typer.Option(True, help="judge one walk under several lights too"),
    own: Path | None = Own,
    plates: list[Path] = Plates,
    jobs: int = Jobs,
    out: Path = Out,
) -> None:
    """Judge textures on held-out walks, with controls and defences; further detectors join transfer and consensus."""
    check_output(out / FIGURES)
    limits, knowing = limits_of(fail_under), named_textures("--adaptive", adaptive)
    for defence in knowing:
        if defence not in DEFENCES:
            raise unknown("defence", defence, DEFENCES)
    if own is not None and walks is not None:
        raise ConfigError("--walks counts held-out walks, and --walk-file takes their place; leave one of them out.")
    gamut = gamut_of(icc)
    given = Attacks(
        {kind: control(kind, gamut) for kind in CONTROLS},
        named_textures("--compare", [f"{OPTIMISED}={out}", *compare]),
        knowing,
    )
    shown = TEST[:walks] if own is None else read_walks(own)
    first, *others = [load_detector(name) for name in detector]
    subject = Subject(first, others, None if hardened is None else load_hardened(hardened, detector[0]))
    for defence in knowing:
        if defence not in subject.defences():
            raise ConfigError(f"--adaptive {defence} needs --hardened FILE, or further detectors, that it consists of.")
    judge = Judge(own_scenes(shown, plates, fps, size, engine, jobs), jobs)
    lit = under_lights(shown[0], fps, size, engine) if lights else []
    measured = measure(subject, judge, given, lit=lit)
    path = out / FIGURES
    record = {
        **measured,
        "libraries": library_metrics(judge, first, {n: given.textures()[n] for n in ("plain", OPTIMISED)}),
        "conditions": conditions(subject, shown, plates, out)
        | {"gamut": gamut.name, "icc": icc and str(icc), "fps": fps, "size": size, "cloth": engine},
    }
    save_record(path, EVALUATION, rounded(record))
    least, results = measured["seen_least"], measured["results"]
    typer.echo(f"seen least: {least} (area {results[least]['area']:.2f}, recall {results[least]['recall']:.2f})")
    if not results[CLEAN]["recall"]:
        typer.echo(f"{first.name} sees nobody in {CLEAN} clothes either: these walks say nothing about it")
    elif least in CONTROLS:
        typer.echo(
            f"the optimised textures hide less than this control (area {results[OPTIMISED]['area']:.2f}): more steps?"
        )
    typer.echo(f"wrote {path}; go on with: drape report --out {out}")
    missed = [f"{name} {results[OPTIMISED][name]:.3f} < {least_value:g}" for name, least_value in limits.items()
              if results[OPTIMISED][name] < least_value]  # fmt: skip
    if missed:
        typer.echo(f"failed: {', '.join(missed)}", err=True)
        raise typer.Exit(FAILED)


def conditions(subject: Subject, walks: Sequence[Walk], plates: Sequence[Path], out: Path) -> dict[str, Any]:
    """What an evaluation depends on: versions, detectors, walks, plates, and how the textures were made."""
    models = [d for d in (subject.detector, *subject.others, subject.hardened) if d is not None]
    made = out / MADE
    return {
        **versions(),
        "detectors": [{"name": d.name, "input_size": d.input_size, "threshold": d.threshold} for d in models],
        "walks": [asdict(walk) for walk in walks],
        "plates": [str(plate) for plate in plates],
        "optimisation": load_record(made, OPTIMISATION, "run `drape optimise` again") if made.exists() else None,
    }


@app.command("report")
def report_command(out: Path = Out) -> None:
    """Write report.html from what optimise and evaluate left in the folder; no detector is needed."""
    check_output(out / "report.html")
    measured = load_record(out / FIGURES, EVALUATION, f"run `drape evaluate --out {out}`")
    told = measured["conditions"]
    plates = [Path(plate) for plate in told["plates"]]
    walk = own_scenes([Walk(**told["walks"][0])], plates[:1], told["fps"], told["size"], told["cloth"])[0]
    gamut = gamut_of(told["icc"] and Path(told["icc"]))
    clothes = {"plain": control("plain", gamut), OPTIMISED: load_images(out / TEXTURES)}
    videos = {
        f"{name} (a box where {measured['detector']} sees a person)": animation(walk.render(clothes[name]), boxes)
        for name, boxes in measured["video"].items()
    }
    write_text(out / "report.html", page(measured, videos, f"{NOTE} Colours: {gamut.name}."))
    typer.echo(f"wrote {out / 'report.html'}")


@app.command("demo")
def demo_command(
    detector: str = typer.Option("nanodet@320"),
    steps: int = typer.Option(25),
    fps: float = Fps,
    size: int = typer.Option(320, min=16, max=2048, help="side of a frame in pixels"),
    engine: str = Engine,
    jobs: int = typer.Option(min(2, os.cpu_count() or 1), min=1, max=256, help="processes side by side"),
    out: Path = Out,
) -> None:
    """All three steps, small: a walking person seen by a real detector before and after, and behind defences."""
    check_output(out / "demo.json")
    start = time.perf_counter()
    spent: dict[str, float] = {}

    def took(step: str) -> None:
        spent[step] = time.perf_counter() - start - sum(spent.values())

    optimise_command(
        detector=[detector], mode="sequence", weighting="window", steps=steps, fps=fps, size=size, engine=engine,
        train=4, icc=None, against="none", hardened=None, product=[], seed=0, jobs=jobs, out=out,
    )  # fmt: skip
    took("optimise")
    evaluate_command(
        detector=[detector], fps=fps, size=size, engine=engine, icc=None, walks=2, hardened=None, compare=[],
        adaptive=[], fail_under=[], lights=False, own=None, plates=[], jobs=jobs, out=out,
    )  # fmt: skip
    took("evaluate")
    report_command(out)
    took("report")
    end_workers()  # so that their time counts
    record = {
        "seconds": time.perf_counter() - start,
        "processor_seconds": sum(os.times()[:4]),  # of this process and of those that it started
        "steps": spent,
        "jobs": jobs,
        "cores": os.cpu_count(),
    }
    save_record(out / "demo.json", "drape's demo", {**rounded(record, 1), **versions()})
    typer.echo(f"the demo took {record['seconds']:.0f} seconds")


@app.command("bench")
def bench_command(
    detector: str = typer.Option(BenchSpec.detector, help="the one that is attacked and defended"),
    other: list[str] = typer.Option(
        [], help="for transfer and consensus; repeat it. The others known by name if not given"
    ),
    to: Path = typer.Option(Path("drape/benchmarks/bench.json"), help="where the figures go"),
    work: Path = typer.Option(Path("out/drape-bench"), help="folder for textures and weights; a second run goes on"),
    seeds: int = typer.Option(6, min=1, help="beginnings of each mode of optimisation; more of them go on"),
    steps: int = typer.Option(BenchSpec.steps, help="of each optimisation"),
    fps: float = typer.Option(BenchSpec.fps, min=0.25, max=60, help="frames per second of the walks"),
    size: int = Size,
    engine: str = Engine,
    train: int = Train,
    walks: int = Walks,
    jobs: int = Jobs,
) -> None:
    """Measure: strengths, sequences against frames and poses, transfer, defences and attacks that know of them."""
    others = tuple(other) or tuple(name for name in detectors() if name != detector.partition("@")[0])
    check_output(to)
    spec = BenchSpec(
        detector=detector,
        others=others,
        steps=steps,
        strengths=tuple(n for n in BenchSpec.strengths if n < steps),
        fps=fps,
        size=size,
        cloth=engine,
        train=train,
        walks=walks,
        window=max(round(WINDOW * fps), 1),
    )
    run_bench(spec, work, to, seeds, jobs)
    typer.echo(f"wrote {to}")


def main() -> None:
    """Run the command line: bad input is one line and exit code 2, an error of drape's own one line and 1."""
    progress.show()
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False) or 0)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("stopped", err=True)
        sys.exit(130)
    except DrapeError as error:
        typer.echo(f"error: {one_line(error)}", err=True)
        sys.exit(2)
    except Exception as error:
        said = getattr(error, "format_message", None)  # of the parser's own errors, which typer does not export
        if callable(said):
            typer.echo(f"error: {one_line(said())} See `drape --help`.", err=True)
            sys.exit(2)
        with tempfile.NamedTemporaryFile("w", prefix="drape-", suffix=".txt", delete=False) as kept:
            traceback.print_exc(file=kept)
        typer.echo(f"error: {type(error).__name__}: {one_line(error)} (a fault of drape; see {kept.name})", err=True)
        sys.exit(1)


def one_line(message: object) -> str:
    """A message without line breaks and orders to a terminal."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in str(message)).split())
