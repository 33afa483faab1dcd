"""Do resolution methods save as much time as operations? The bundled models at several sizes.

    python benchmarks/resolution_latency.py --model emoji-flux --json benchmarks/resolution-latency.json
    python benchmarks/resolution_latency.py --model emoji-kontext --json benchmarks/resolution-latency.json
    python benchmarks/resolution_latency.py --model sprites-wan --json benchmarks/resolution-latency.json

Each command replaces the rows of its model. The method, the plain sampler with as many evaluations and the full run
take turns; medians. The time between the transformer's first and its last layer is taken apart, so that what is left
is the pipeline, the text, the decoder and the engine. Larger sizes than a model was trained at make no good images,
but cost what they cost. Leave the machine alone while it runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hasten.bench import subject
from hasten.bench.arms import Accelerated
from hasten.bench.environment import environment
from hasten.bench.labels import short_label
from hasten.bench.requests import parse_request
from hasten.bench.sampling import Attach, count_flops, draw_sample, plain
from hasten.io import write_atomically
from rich.progress import track

FULL = 50
CASES: dict[
    str, list[tuple[str, int, tuple[int, ...]]]
] = {  # method as the bench takes it, evaluations, sides in pixels
    "emoji-flux": [
        ("fresco:preset=18", 18, (64, 128, 192)),
        ("fresco:preset=11", 11, (64, 128)),
        ("fresco:preset=9", 9, (64, 128)),
        ("fresco:preset=18+foca:interval=2:warmup=1", 18, (64, 128)),
    ],
    "emoji-kontext": [("specedit:discrepancy=latent:selector=top", 20, (64, 128))],
    "sprites-wan": [("dvg:budget=0.5", 20, (64, 128))],
}


@dataclass
class Inside:
    """Seconds between the first and the last layer of a transformer."""

    seconds: float = 0.0
    started: float = 0.0
    removals: list[Any] = field(default_factory=list)

    def watch(self, transformer: Any) -> None:
        """Begin to count."""
        first = getattr(transformer, "x_embedder", None) or transformer.patch_embedding
        self.removals = [
            first.register_forward_pre_hook(lambda *_: self._start()),
            transformer.proj_out.register_forward_hook(lambda *_: self._stop()),
        ]

    def _start(self) -> None:
        self.started = time.perf_counter()

    def _stop(self) -> None:
        self.seconds += time.perf_counter() - self.started

    def leave(self) -> float:
        """Stop, and what was counted."""
        for removal in self.removals:
            removal.remove()
        return self.seconds


def timed(model: subject.Subject, attach: Attach, steps: int, call: dict[str, Any]) -> tuple[float, float]:
    """Seconds of a call, and those inside the transformer."""
    inside = Inside()
    inside.watch(model.pipe.transformer)
    try:
        seconds = draw_sample(model, attach, steps, model.prompts[0], 0, call).seconds
    finally:
        counted = inside.leave()
    return seconds, counted


def rows(name: str, repeats: int) -> list[dict[str, Any]]:
    """A row for each method and size."""
    model = subject.load(name)
    model.pipe.set_progress_bar_config(disable=True)
    cases = [(text, steps, side) for text, steps, sides in CASES[name] for side in sides]
    return [row(model, *case, repeats) for case in track(cases, description=name)]


def row(model: subject.Subject, text: str, steps: int, side: int, repeats: int) -> dict[str, Any]:
    """Operations and seconds of a method, of the plain sampler with as many evaluations, and of the full run."""
    request = parse_request(text)
    method = Accelerated(request.caching, request.resolution)
    arms: dict[str, tuple[Attach, int]] = {"full": (plain, FULL), "plain": (plain, steps), "method": (method, steps)}
    call = {"height": side, "width": side}
    counted = {arm: count_flops(model, *how, model.prompts[0], 0, call) for arm, how in arms.items()}
    flops = {arm: operations for arm, (operations, _) in counted.items()}
    times: dict[str, list[tuple[float, float]]] = {arm: [] for arm in arms}
    for _ in range(repeats):
        for arm, how in arms.items():
            times[arm].append(timed(model, *how, call))
    whole = {arm: statistics.median(seconds for seconds, _ in pairs) for arm, pairs in times.items()}
    inside = {arm: statistics.median(seconds for _, seconds in pairs) for arm, pairs in times.items()}

    def gain(of: dict[str, Any], base: str) -> float:
        return float(of[base] / of["method"])

    found: dict[str, Any] = {
        "model": model.name,
        "method": text,
        "side": side,
        "steps": steps,
        "plan": counted["method"][1].plan,
        "flops": flops,
        "seconds": {arm: round(seconds, 6) for arm, seconds in whole.items()},
        "transformer_seconds": {arm: round(seconds, 6) for arm, seconds in inside.items()},
        "outside_ms_per_step": {
            arm: round(1e3 * (whole[arm] - inside[arm]) / count, 4) for arm, (_, count) in arms.items()
        },
    }
    for base in ("full", "plain"):
        found[f"against_{base}"] = {
            "flops_ratio": round(gain(flops, base), 4),
            "latency_ratio": round(gain(whole, base), 4),
            "latency_share": round(gain(whole, base) / gain(flops, base), 4),
            "transformer_share": round(gain(inside, base) / gain(flops, base), 4),
        }
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CASES, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    measured = rows(options.model, options.repeats)
    kept = json.loads(options.json.read_text())["rows"] if options.json.exists() else []
    merged = [row for row in kept if row["model"] != options.model] + measured
    merged.sort(key=lambda row: list(CASES).index(row["model"]))
    result = {"environment": environment(), "repeats": options.repeats, "rows": merged}
    write_atomically(options.json, json.dumps(result, indent=1) + "\n")
    for one in measured:
        gain = one["against_full"]
        print(
            f"{one['model']} {one['side']}: {short_label(one['method'])} {gain['flops_ratio']:.2f} fewer operations, "
            f"{gain['latency_ratio']:.2f} faster (share {gain['latency_share']:.2f})"
        )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
