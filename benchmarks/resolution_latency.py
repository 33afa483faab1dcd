"""Do resolution methods save as much time as operations? The bundled models at several sizes, one method each.

    python benchmarks/resolution_latency.py --model emoji-flux --json benchmarks/resolution-latency.json
    python benchmarks/resolution_latency.py --model emoji-kontext --json benchmarks/resolution-latency.json
    python benchmarks/resolution_latency.py --model sprites-wan --json benchmarks/resolution-latency.json

Each command replaces the rows of its model. The method and the plain sampler with as many evaluations take turns;
medians. The time between the transformer's first and its last layer is taken apart, so that what is left is the
pipeline, the text, the decoder and the engine. Larger sizes than a model was trained at make no good pictures, but
cost what they cost. Leave the machine alone while it runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hasten
import torch
from hasten import zoo
from hasten.bench.arms import Accelerated
from hasten.bench.runner import environment
from hasten.bench.sampling import Attach, count_flops, plain, shoot
from hasten.bench.schema import short_label
from rich.progress import track

SPECEDIT = hasten.SpecEdit(draft=8, mixed=10, final=2, discrepancy="latent", selector="top")
CASES: dict[str, tuple[str, Any, tuple[int, ...], int]] = {  # label, method, sides in pixels, evaluations
    "emoji-flux": ("fresco:preset=18", hasten.Fresco(preset="18"), (64, 128, 192), 18),
    "emoji-kontext": ("specedit:selector=top:share=0.2", SPECEDIT, (64, 128, 192), 20),
    "sprites-wan": ("dvg:budget=0.5", hasten.DVG(budget=0.5), (48, 96), 20),
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


def timed(model: zoo.ReferenceModel, attach: Attach, steps: int, call: dict[str, Any]) -> tuple[float, float]:
    """Seconds of a call, and those inside the transformer."""
    inside = Inside()
    inside.watch(model.pipe.transformer)
    try:
        seconds = shoot(model, attach, steps, model.prompts[0], 0, call).seconds
    finally:
        counted = inside.leave()
    return seconds, counted


def rows(name: str, repeats: int) -> list[dict[str, Any]]:
    """A row for each size."""
    label, method, sides, steps = CASES[name]
    model = zoo.load(name)
    model.pipe.set_progress_bar_config(disable=True)
    arms: dict[str, Attach] = {"plain": plain, "method": Accelerated(None, method)}
    found = []
    for side in track(sides, description=name):
        call = {"height": side, "width": side}
        flops, shots = {}, {}
        for arm, attach in arms.items():
            flops[arm], shots[arm] = count_flops(model, attach, steps, model.prompts[0], 0, call)
        times: dict[str, list[tuple[float, float]]] = {arm: [] for arm in arms}
        for _ in range(repeats):
            for arm, attach in arms.items():
                times[arm].append(timed(model, attach, steps, call))
        whole = {arm: statistics.median(seconds for seconds, _ in pairs) for arm, pairs in times.items()}
        inside = {arm: statistics.median(seconds for _, seconds in pairs) for arm, pairs in times.items()}
        ratio = flops["plain"] / flops["method"]
        found.append(
            {
                "model": name,
                "method": label,
                "side": side,
                "steps": steps,
                "plan": shots["method"].plan,
                "flops": flops,
                "seconds": {arm: round(seconds, 6) for arm, seconds in whole.items()},
                "transformer_seconds": {arm: round(seconds, 6) for arm, seconds in inside.items()},
                "flops_ratio": round(ratio, 4),
                "latency_ratio": round(whole["plain"] / whole["method"], 4),
                "latency_share": round(whole["plain"] / whole["method"] / ratio, 4),
                "transformer_share": round(inside["plain"] / inside["method"] / ratio, 4),
                "outside_ms_per_step": {arm: round(1e3 * (whole[arm] - inside[arm]) / steps, 4) for arm in arms},
            }
        )
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
    merged.sort(key=lambda row: (list(CASES).index(row["model"]), row["side"]))
    result = {"environment": environment(), "repeats": options.repeats, "rows": merged}
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    for row in measured:
        print(
            f"{row['model']} {row['side']}: {short_label(row['method'])} {row['flops_ratio']:.2f} fewer operations, "
            f"{row['latency_ratio']:.2f} faster (share {row['latency_share']:.2f})"
        )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
