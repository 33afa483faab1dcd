"""One small file of each kind that hasten shares, what reads and uses it, and ways in which it may be damaged.

`Specimen.make` writes the file, `Specimen.use` reads it, does with it what it is for, and returns a digest of what came
out. `damages` yields changed contents: `forged` ones have a digest that fits, as a malicious author would make it.
"""

from __future__ import annotations

import hashlib
import json
import random
import string
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

import hasten
from hasten.bench import recording
from hasten.bench.measurements import Measurement
from hasten.bench.partial import KIND as PARTIAL
from hasten.bench.partial import Partial
from hasten.bench.result import Result, Settings, StreamResult, StreamSettings, read_result
from hasten.bench.row import Baseline, Row, StreamRow
from hasten.bench.tables import as_csv, as_markdown, table_of
from hasten.caching import computed_steps
from hasten.caching.calibrated import gram_of
from hasten.caching.components import FeatureKey
from hasten.caching.method import SEARCHED
from hasten.calibration import Calibration, Fingerprint, Trace
from hasten.errors import HastenError, ModelError
from hasten.fitting.token_model import CHECKPOINT, Trainer
from hasten.fitting.token_recipe import Recipe, build_model
from hasten.io import check_sealed, digest_of, read_json, read_record, write_atomically, write_sealed
from hasten.io.folder import LIST
from hasten.quality.certificate import Certificate, Evidence, Tried
from hasten.quality.conditions import Conditions
from hasten.quality.tolerance import Tolerance
from hasten.solvers.scheduler import LeapScheduler
from hasten.streaming.budgets import HeadBudgets
from hasten.tokens import SemanticTree, TokenMap
from hasten.tokens.export import export_model, open_model
from hasten.tokens.refiner import Refiner, RefinerConfig
from hasten.tokens.shards import TokenShards, write_shards

STEPS, WIDTH = 8, 6
SPECIMEN_NAMES = (
    "l2p",
    "hyca",
    "svdcache",
    "magcache",
    "teacache",
    "leapcache",
    "steps",
    "leap",
    "leap scheduler",
    "map",
    "tree",
    "refiner",
    "budgets",
    "shards: index",
    "checkpoint",
    "model: facts",
    "result",
    "stream result",
    "partial",
    "recording",
    "sealed: list",
    "certificate",
)  # one for each writer
FINGERPRINT = Fingerprint(
    "Model", "c" * 16, "w" * 16, "Scheduler", tuple(1000.0 - 100 * i for i in range(STEPS)), ("cond",), 3.5, "hidden"
)
RECIPE = Recipe(steps=2, batch=2, width=8, layers=1, heads=2, warmup=0)
CLASSES = 3


def digest(*values: Any) -> str:
    """Digest of tensors, arrays and plain values."""
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().numpy()
        if isinstance(value, np.ndarray):
            found.update(f"{value.dtype} {value.shape}".encode() + value.tobytes())
        elif isinstance(value, dict):
            found.update(digest(*(x for item in sorted(value.items()) for x in item)).encode())
        elif isinstance(value, (list, tuple)):
            found.update(digest(*value).encode() + b"]")
        else:
            found.update(repr(value).encode())
    return found.hexdigest()


@dataclass(frozen=True)
class Specimen:
    """One kind of file.

    Attributes:
        name: of the kind.
        file: path within its folder, of the file that is damaged.
        make: writes everything into a folder.
        use: reads from the folder; returns a digest of what was read and of what it does.
        seal: makes the digests of other files in the folder fit, as a malicious author would.
    """

    name: str
    file: str
    make: Callable[[Path], object]
    use: Callable[[Path], str]
    seal: Callable[[Path], object] = lambda folder: None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _seal(folder: Path, header_file: str, entry: str) -> None:
    """Let the digests that a header keeps of other files be those of the files as they are."""
    header = json.loads((folder / header_file).read_text())
    header["content"][entry] = {name: _sha256(folder / name) for name in header["content"][entry]}
    header["digest"] = digest_of(header["content"])
    (folder / header_file).write_text(json.dumps(header))


def _seal_shards(folder: Path) -> None:
    _seal(folder, "index.json", "digests")


def _seal_model(folder: Path) -> None:
    _seal(folder, "hasten_tokens.json", "files")


def _features(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, STEPS, 4, WIDTH, generator=generator).cumsum(1)


def _calibration(method: str, tensors: dict[str, Any], options: dict[str, Any] | None = None) -> Callable[[Path], Path]:
    site = "output" if method == "l2p" else "hidden"
    fingerprint = Fingerprint(**{**vars(FINGERPRINT), "site": site})
    made = Calibration(method, tensors, fingerprint, {"error": [0.5, 0.25], "note": "ok"}, options or {"seed": 0})
    return lambda folder: made.save(folder / "file.safetensors")


def _used(build: Callable[[Path], Any]) -> Callable[[Path], str]:
    def use(folder: Path) -> str:
        path = folder / "file.safetensors"
        loaded = Calibration.load(path)
        made = build(path)
        return digest(loaded.method, loaded.tensors, vars(loaded.fingerprint), loaded.report, loaded.options, made)

    return use


def _weights(method: Any) -> list[Any]:
    past = [step for step in reversed(computed_steps(method.plan(), STEPS)) if step < 5]
    parts = method.components(FeatureKey("cond"))
    return [predictor.weights(5, past[: predictor.memory]) for predictor in parts.predictors.values()]


def _leap_tables() -> dict[str, Any]:
    tables: dict[str, Any] = {}
    for count in (3, 5):
        times = torch.linspace(1000, 100, count, dtype=torch.float64)
        generator = torch.Generator().manual_seed(count)
        found = {"timesteps": times, "levels": times / 1000}
        if count == 3:
            found["timesteps_by_scale"] = torch.stack([times, torch.linspace(1000, 50, count, dtype=torch.float64)])
            found["noise_timesteps"] = torch.linspace(0, 1000, 11, dtype=torch.float64)
            found["noise_levels"] = found["noise_timesteps"] / 1000
        for form, width in (("guided", 1), ("passes", 2)):
            rows = torch.zeros(2, count, 1 + width * count, dtype=torch.float64)
            for k in range(count):
                end = 1 + width * (k + 1)
                rows[:, k, :end] = torch.randn(2, end, dtype=torch.float64, generator=generator)
            found[form] = rows
        tables |= {f"{count}/{name}": tensor for name, tensor in found.items()}
    return tables


LEAP_OPTIONS = {
    "prediction_type": "flow_prediction",
    "num_train_timesteps": 1000,
    "shift_mu": 0.5,
    "guidances": [2.0, 3.0],
    "mixtures": [2.0, 3.0],
    "noise_scale": 1.0,
    "plain": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
}


def _sampled(scheduler: LeapScheduler) -> torch.Tensor:
    """What the scheduler makes of a fixed model in its shortest run."""
    count, scheduler = min(map(int, scheduler.config.tables)), scheduler.at_guidance(2.5)
    made = []
    for scheduler.expects_passes in (False, True):
        scheduler.set_timesteps(count)
        x = torch.linspace(-1, 1, 8)[None]
        for t in scheduler.timesteps:
            passes = [x * 0.5 + t / 1000, 0.3 * x]
            for answer in passes:
                scheduler.observe(answer)
            x = scheduler.step(passes[1] + 2.5 * (passes[0] - passes[1]), t, x).prev_sample
        made.append(x)
    return torch.cat(made)


def _make_scheduler(folder: Path) -> None:
    LeapScheduler.of(Calibration("leap", _leap_tables(), FINGERPRINT, {}, LEAP_OPTIONS)).save_pretrained(folder)


def _use_scheduler(folder: Path) -> str:
    scheduler = LeapScheduler.from_pretrained(folder)
    names = ("prediction_type", "num_train_timesteps", "shift_mu", "plain", "fingerprint", "certificate")
    return digest(_sampled(scheduler), [str(scheduler.config[name]) for name in names], len(scheduler))


@cache
def _tree() -> SemanticTree:
    codes = np.random.default_rng(0).standard_normal((24, 4))
    return SemanticTree.fit(codes, used=np.arange(24) % 5, normalize="none")


def _use_map(folder: Path) -> str:
    mapping = TokenMap.load(folder / "file.safetensors")
    return digest(mapping.labels, mapping.members, mapping.sizes, mapping.kind, mapping.fingerprint, mapping([0, 3, 1]))


def _use_tree(folder: Path) -> str:
    tree = SemanticTree.load(folder / "file.safetensors")
    cuts = [tree.cut(k) for k in range(1, min(tree.leaves, 6))]
    return digest(
        tree.merges, tree.heights, tree.used, tree.nearest, tree.normalize, tree.exact, tree.fingerprint, cuts
    )


def _make_refiner(folder: Path) -> None:
    torch.manual_seed(0)
    Refiner(_tree().map(5), RefinerConfig(hidden=4, width=8, heads=2)).save(folder / "file.safetensors")


def _use_refiner(folder: Path) -> str:
    refiner = Refiner.load(folder / "file.safetensors")
    hidden, clusters = torch.ones(1, 3, refiner.config.hidden), torch.zeros(1, 3, dtype=torch.long)
    return digest(refiner.state_dict(), vars(refiner.config), refiner(hidden, clusters))


def _use_budgets(folder: Path) -> str:
    budgets = HeadBudgets.load(folder / "file.json")
    return digest(budgets.table, dict(budgets.facts), budgets.mean, budgets.of(0, len(budgets.table[0])))


def _make_shards(folder: Path) -> TokenShards:
    tokens = np.arange(60).reshape(10, 6) % 24
    return write_shards(folder, tokens, 24, np.arange(10) % CLASSES, rows=6)


def _use_shards(folder: Path) -> str:
    shards = TokenShards.open(folder)
    every = np.arange(len(shards))
    return digest(shards.take(every), shards.labels(every), shards.token_counts(), shards.counts, shards.vocabulary)


def _trainer(folder: Path) -> Trainer:
    if not (folder / "shards" / "index.json").exists():
        _make_shards(folder / "shards")
    return Trainer(TokenShards.open(folder / "shards"), _tree().map(5), RECIPE, cpu=True)


def _make_checkpoint(folder: Path) -> None:
    trainer = _trainer(folder)
    trainer.step()
    trainer.save(folder / CHECKPOINT)


def _use_checkpoint(folder: Path) -> str:
    trainer = _trainer(folder)
    trainer.restore(folder / CHECKPOINT)
    position = (trainer.steps, trainer.cpu_seconds, digest(trainer.causal.state_dict()))
    loss = trainer.step()
    return digest(position, loss, trainer.causal.state_dict())


def _make_model(folder: Path) -> None:
    mapping = _tree().map(5)
    built = build_model(mapping, CLASSES, 6, RECIPE)
    export_model(built.model, mapping, folder, built.vocabulary)


def _use_model(folder: Path) -> str:
    opened = open_model(folder)
    model, mapping = opened.model, opened.mapping
    return digest(model.state_dict(), mapping.labels, model.config.vocab_size)


def _make_result(folder: Path) -> None:
    environment = {"hasten": "0.2.0", "device": "cpu: x, 1 threads"}
    figures: dict[str, Any] = {"computed_steps": 9.0, "flops_ratio": 5.5, "seconds": 0.4, "cache_bytes": 12}
    rows = [
        Row(id="foca-9", method="foca", library="hasten", budget=9, psnr=44.5, error_per_step=[0.1, None], **figures),
        Row(id="x-9", method="dbcache", library="cache-dit", budget=9, failed="not installed"),
    ]
    settings = Settings(prompts=["a"], seed=0, height=64, width=64, steps=50, guidance=1.0)
    baseline = Baseline(steps=50, computed_steps=50.0, flops=10, seconds=2.0)
    result = Result(created="now", environment=environment, model="m", settings=settings, baseline=baseline, rows=rows)
    result.write(folder / "file.json")


def _make_stream_result(folder: Path) -> None:
    times = ("seconds_per_frame", "latency_ratio", "attention_seconds", "attention_ratio")
    figures: dict[str, Any] = dict.fromkeys((*times, "work_ratio", "kv_ratio", "overhead"), 1.5)
    rows = [StreamRow(method="full-history", cache_bytes=3, psnr_curve=[40.0], drift={"grade": [1.0, None]}, **figures)]
    settings = StreamSettings(1, 6, 2)
    StreamResult(created="now", environment={}, model="m", settings=settings, rows=rows).write(folder / "file.json")


def _use_result(folder: Path) -> str:
    result = read_result(folder / "file.json")
    table = table_of(result, wide=True)
    return digest(json.dumps(asdict(result), sort_keys=True), as_markdown(table), as_csv(result))


IDENTITY = {"model": "m"}


def _make_partial(folder: Path) -> None:
    partial = Partial(folder / "file.json", IDENTITY)
    partial.flops["baseline"] = 12
    partial.trial("t", lambda: (0.5, 1.0))
    metrics = {"psnr": float("inf"), "ssim": 0.5}
    partial.add(0, {"baseline": Measurement(0, metrics, [0.5], 3, 2.0, 2, None, (64, 64))})


def _use_partial(folder: Path) -> str:
    read_record(folder / "file.json", PARTIAL)
    kept = Partial(folder / "file.json", IDENTITY)
    found = kept.measurements("baseline")
    return digest(kept.flops, kept.failures, kept.finished, repr(found), kept.trial("t", lambda: (0.5, 1.0)))


def _make_recording(folder: Path) -> None:
    features = {"cond": {"hidden": _features()[:1].bfloat16(), "output": torch.ones(1, STEPS, 5)}}
    recording._write(Trace(features, FINGERPRINT), folder / "file.safetensors")


def _use_recording(folder: Path) -> str:
    trace = recording._read(folder / "file.safetensors")
    return digest({name: {k: v.float() for k, v in keys.items()} for name, keys in trace.features.items()},
                  vars(trace.fingerprint))  # fmt: skip


def _make_certificate(folder: Path) -> None:
    write_atomically(folder / "foca.safetensors", b"steps")
    tried = Tried("foca:searched=foca.safetensors", 9.0, 5.5, 40, 39, 0.01, True)
    evidence = Evidence(40, 39, {"share": 0.95}, {"flip": {"median": 0.01}}, "p" * 16, 8, "fixed order", (tried,))
    conditions = Conditions(
        "Pipeline", {}, "Scheduler", {"shift": 3.0}, 50, (1.0, 0.5), 64, 64, None, {"guidance_scale": (1.0, 3.5)}
    )
    files = {"foca.safetensors": _sha256(folder / "foca.safetensors")}
    tolerance = Tolerance(max_flip=0.05)
    made = Certificate("high", tolerance, tried.setting, 9, 5.5, conditions, evidence, files, {"torch": "2"}, "hasten")
    made.save(folder / "file.json")


def _use_certificate(folder: Path) -> str:
    made = Certificate.load(folder / "file.json")
    content = {name: value for name, value in asdict(made).items() if name != "folder"}
    call = made.tolerance.kept({"flip": 0.01}), made.tolerance.level
    return digest(json.dumps(content, sort_keys=True), str(made), made.expression.replace(str(folder), ""), call)


def _make_sealed(folder: Path) -> None:
    def fill(scratch: Path) -> None:
        write_atomically(scratch / "part" / "config.json", json.dumps({"width": 8, "name": "x" * 99}))

    write_sealed(folder, fill)


def _use_sealed(folder: Path) -> str:
    check_sealed(folder, ModelError, "Export it again.")
    return digest(json.dumps(read_json(folder / "part" / "config.json"), sort_keys=True))


def _seal_list(folder: Path) -> None:
    _seal(folder, LIST, "files")


def specimens() -> dict[str, Specimen]:
    """Every kind, by name."""
    grams = torch.from_numpy(np.stack([gram_of(_features()[..., part]) for part in (slice(0, 2), slice(2, None))]))
    labels = torch.tensor([0, 0, 1, 1, 1, 1], dtype=torch.int32)
    basis = torch.linalg.qr(torch.randn(WIDTH, 3, generator=torch.Generator().manual_seed(1)))[0].contiguous()
    steps = torch.tensor([0, 2, 4])
    table = torch.zeros(STEPS, 3, dtype=torch.float64)
    table[1, 0], table[3, :2], table[5:, :] = 1.0, torch.tensor([0.25, 0.75]), torch.tensor([-0.5, 0.5, 1.0])
    calibrations: dict[str, tuple[dict[str, Any], Callable[[Path], Any]]] = {
        "l2p": (
            {"gram/cond": torch.from_numpy(gram_of(_features()))},
            lambda path: _weights(hasten.L2P(calibration=path, interval=3)),
        ),
        "hyca": (
            {"clusters/hidden": labels, "grams/hidden": grams},
            lambda path: hasten.HyCa(calibration=path, interval=3).chosen,
        ),
        "svdcache": (
            {"basis/cond/hidden": basis},
            lambda path: _weights(hasten.SVDCache(calibration=path, interval=3)),
        ),
        "magcache": (
            {"ratios": torch.linspace(1, 0.8, STEPS, dtype=torch.float64)},
            lambda path: hasten.MagCache(calibration=path).gate() and "",
        ),
        "teacache": (
            {"coefficients": torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)},
            lambda path: hasten.TeaCache(calibration=path).polynomial(),
        ),
        "leapcache": (
            {"3/steps": steps, "3/cond": table},
            lambda path: _weights(hasten.LeapCache(calibration=path, interval=3)),
        ),
        SEARCHED: (
            {"steps/3": steps, "steps/4": torch.tensor([0, 1, 3, 5])},
            lambda path: hasten.FoCa(searched=path).plan().for_run(STEPS),
        ),
    }
    found = [
        Specimen(name, "file.safetensors", _calibration(name, tensors), _used(build))
        for name, (tensors, build) in calibrations.items()
    ]
    load_leap = _used(lambda path: _sampled(LeapScheduler.load(path)))
    found += [
        Specimen("leap", "file.safetensors", _calibration("leap", _leap_tables(), LEAP_OPTIONS), load_leap),
        Specimen("leap scheduler", "scheduler_config.json", _make_scheduler, _use_scheduler),
        Specimen("map", "file.safetensors", lambda folder: _tree().map(5).save(folder / "file.safetensors"), _use_map),
        Specimen("tree", "file.safetensors", lambda folder: _tree().save(folder / "file.safetensors"), _use_tree),
        Specimen("refiner", "file.safetensors", _make_refiner, _use_refiner),
        Specimen(
            "budgets",
            "file.json",
            lambda folder: HeadBudgets(((1, 2), (3, 0)), {"model": "ours", "chunk": 3}).save(folder / "file.json"),
            _use_budgets,
        ),
        Specimen("shards: index", "index.json", _make_shards, _use_shards),
        Specimen("shards: tokens", "tokens-00001.npy", _make_shards, _use_shards, _seal_shards),
        Specimen("shards: classes", "labels-00000.npy", _make_shards, _use_shards, _seal_shards),
        Specimen("checkpoint", CHECKPOINT, _make_checkpoint, _use_checkpoint),
        Specimen("model: facts", "hasten_tokens.json", _make_model, _use_model),
        Specimen("model: weights", "model.safetensors", _make_model, _use_model, _seal_model),
        Specimen("model: config", "config.json", _make_model, _use_model, _seal_model),
        Specimen("result", "file.json", _make_result, _use_result),
        Specimen("stream result", "file.json", _make_stream_result, _use_result),
        Specimen("partial", "file.json", _make_partial, _use_partial),
        Specimen("recording", "file.safetensors", _make_recording, _use_recording),
        Specimen("certificate", "file.json", _make_certificate, _use_certificate),
        Specimen("sealed: list", LIST, _make_sealed, _use_sealed),
        Specimen("sealed: file", "part/config.json", _make_sealed, _use_sealed, _seal_list),
    ]
    return {specimen.name: specimen for specimen in found}


# --- damages


def truncated(content: bytes) -> Iterator[bytes]:
    """The content cut off at each 5 %."""
    for share in range(0, 100, 5):
        yield content[: len(content) * share // 100]


def flipped(content: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """One byte changed: in one bit, or to any other value."""
    rng = random.Random(seed)
    for i in range(count):
        changed = bytearray(content)
        place = rng.randrange(len(content))
        changed[place] ^= 1 << rng.randrange(8) if i % 2 else rng.randrange(1, 256)
        yield bytes(changed)


DEEP: Any = [[]]
for _ in range(200):
    DEEP = [DEEP]
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 7, 2**31, 2**40, 2**63 - 1, 2**63, 10**30,
    0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "x", "F64", "I64", "\x1b[31mred\n", "\ud800", "a" * 100_000, [], {}, [0], [0, 0], [-1, 5], [2**62, 2**62], DEEP,
    [None], {"a": 1}, [0] * 10_000, "../../etc/passwd",
)  # fmt: skip


def mutated(value: Any, rng: random.Random) -> Any:
    """A JSON value with one to three places changed: replaced, removed, renamed, added, or moved."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = [place for place in _places(value) if place[1] != "digest"]
        if not places:
            return deepcopy(rng.choice(VALUES))
        parent, key = rng.choice(places)
        action = rng.randrange(6)
        if action <= 2:
            parent[key] = deepcopy(rng.choice(VALUES))
        elif action == 3:
            del parent[key]
        elif action == 4:
            moved = parent.pop(key)
            if isinstance(parent, dict):
                parent[rng.choice((f"{key}x", "kind", "T/x", "3/steps", "\n", rng.choice(string.ascii_letters)))] = (
                    moved
                )
            else:
                parent.insert(rng.randrange(len(parent) + 1), moved)
        elif isinstance(parent[key], (int, float)) and not isinstance(parent[key], bool):
            parent[key] = parent[key] * rng.choice((-1, 2, 1000)) + rng.choice((-1, 0, 1))
        else:
            parent[key] = [parent[key]]
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every place within a JSON value, as parent and key."""
    found = []
    pending = [value]
    while pending:
        parent = pending.pop()
        keys = list(parent) if isinstance(parent, dict) else range(len(parent)) if isinstance(parent, list) else ()
        for key in keys:
            found.append((parent, key))
            pending.append(parent[key])
    return found


def structured(content: bytes, count: int, forged: bool, seed: int = 0) -> Iterator[bytes]:
    """Contents whose header, table of tensors or numbers were changed with the format in mind."""
    rng = random.Random(seed)
    for _ in range(count):
        if content[:1] == b"{":
            yield _structured_json(content, forged, rng)
        elif content[:6] == b"\x93NUMPY":
            yield _structured_npy(content, rng)
        else:
            yield _structured_tensors(content, forged, rng)


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def _forge(header: Any, tensors: dict[str, Any] | None = None) -> None:
    if isinstance(header, dict) and "content" in header:
        try:
            header["digest"] = digest_of(header["content"], tensors)
        except (ValueError, RecursionError):
            header["digest"] = "0" * 64


def _structured_json(content: bytes, forged: bool, rng: random.Random) -> bytes:
    value = mutated(json.loads(content), rng)
    if forged and isinstance(value, dict) and "tables" in value:  # a scheduler's configuration
        names = ("tables", "prediction_type", "num_train_timesteps", "shift_mu")
        try:
            value["digest"] = digest_of({name: value.get(name) for name in names})
        except ValueError:
            value["digest"] = "0" * 64
    elif forged and isinstance(value, dict) and "schema" in value:  # a result of the bench
        value.pop("digest", None)
        try:
            value["digest"] = digest_of(value)
        except (ValueError, RecursionError):
            value["digest"] = "0" * 64
    elif forged:
        _forge(value)
    return _dumped(value)


def _structured_npy(content: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(content[8:10], "little")
    header, data = content[10 : 10 + length].decode("latin1"), content[10 + length :]
    swaps = [("'|u1'", "'|O'"), ("'|u1'", "'<f8'"), ("(", "(9999999999, "), ("False", "True"), ("{", "[[[["), ("}", "")]
    swaps += [(":", ""), ("'shape'", "'shap'"), ("'", '"'), ("descr", "\x00"), ("(", "(-")]
    header = header.replace(*rng.choice(swaps), 1)
    return (
        b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode("latin1") + data[: rng.randrange(99)]
    )


def _structured_tensors(content: bytes, forged: bool, rng: random.Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    table, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    where = rng.randrange(4)
    if where == 0:  # the table of safetensors
        metadata = table.pop("__metadata__", None)
        table = mutated(table, rng)
        if isinstance(table, dict) and metadata is not None:
            table["__metadata__"] = metadata
    elif where == 1 and "hasten" in table.get("__metadata__", {}):  # hasten's header
        header = mutated(json.loads(table["__metadata__"]["hasten"]), rng)
        if forged:
            _forge(header, load_arrays(content))
        table["__metadata__"]["hasten"] = json.dumps(header)
    elif "hasten" in table.get("__metadata__", {}):  # the numbers, or tensors of other shapes
        return _other_numbers(content, json.loads(table["__metadata__"]["hasten"]), forged, rng)
    else:
        table = mutated(table, rng)
    text = _dumped(table)
    return len(text).to_bytes(8, "little") + text + data


NUMBERS = (float("nan"), float("inf"), -1.0, 0.0, 1e300, 2.0**31, -(2.0**62), 3.0)


def _other_numbers(content: bytes, header: Any, forged: bool, rng: random.Random) -> bytes:
    arrays = {name: array.copy() for name, array in load_arrays(content).items()}
    name = rng.choice(sorted(arrays))
    action = rng.randrange(6)
    with np.errstate(all="ignore"):
        if action <= 2 and arrays[name].size:
            flat = arrays[name].reshape(-1)
            flat[rng.randrange(flat.size)] = np.array(rng.choice(NUMBERS)).astype(flat.dtype)
        elif action == 3:
            arrays[name] = arrays[name][: rng.randrange(1 + len(arrays[name]))] if arrays[name].ndim else arrays[name]
        elif action == 4:
            arrays[name] = arrays[name].astype(rng.choice(("float16", "int64", "uint8", "float64")))
        else:
            arrays[rng.choice(("x", "a/b/c", "3/other", "labels", "\n"))] = arrays.pop(name)
    if forged:
        _forge(header, arrays)
    return save_arrays(arrays, metadata={"hasten": json.dumps(header)})


# --- what comes of them


@dataclass
class Outcome:
    """Counts of one kind.

    Attributes:
        tried: damaged files.
        refused: with an error of hasten of one line that names the file.
        equal: read, and what came out is what the undamaged file gives.
        different: read, and something else came out.
        raw: other errors, and errors of hasten that are no such line.
    """

    tried: int = 0
    refused: int = 0
    equal: int = 0
    different: int = 0
    raw: tuple[str, ...] = ()


def try_all(specimen: Specimen, folder: Path, damages: Iterator[bytes], outcome: Outcome, forged: bool = False) -> None:
    """Put each content in the place of the file and use it."""
    path = folder / specimen.file
    whole = path.read_bytes()
    expected = specimen.use(folder)
    for content in damages:
        path.write_bytes(content)
        if forged:
            specimen.seal(folder)
        outcome.tried += 1
        try:
            outcome.equal, outcome.different = (
                (outcome.equal + 1, outcome.different)
                if specimen.use(folder) == expected
                else (outcome.equal, outcome.different + 1)
            )
        except HastenError as error:
            text = str(error)
            if text.isprintable() and len(text) < 1000:
                outcome.refused += 1
            else:
                outcome.raw += (f"not one short line: {text[:200]!r}",)
        except Exception as error:
            outcome.raw += (f"{type(error).__name__}: {error} after {content[:60]!r}",)
    path.write_bytes(whole)
    if forged:
        specimen.seal(folder)
    assert specimen.use(folder) == expected
