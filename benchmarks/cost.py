"""What resolution methods cost at the sizes that people use, counted without weights or arithmetic.

    python benchmarks/cost.py      writes benchmarks/cost.json

The transformers of diffusers run once for each number of tokens on the meta device, under PyTorch's operation counter,
and the methods' own plans say how many steps they make at each. Text encoders, the VAE and the sampler are not counted;
a speed-up that is measured will be lower. `published` has the totals that papers give for the same setting, in TFLOPs.
"""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel
from hasten import DVG, RALU, Bottleneck, Fresco
from hasten.bench.environment import environment
from hasten.bench.sampling import flop_counter
from hasten.io import write_atomically
from hasten.resolution.plan import feasible
from hasten.resolution.planned import stage_lengths

OUT = Path(__file__).parent / "cost.json"
TEXT, FINE, STEPS = 512, 4096, 50  # 1024x1024 pixels
COARSE = FINE // 4
PUBLISHED = {"plain, 50 steps": 3719.5, "fresco, preset=30": 1295.99, "fresco, preset=18": 788.03}
Components = list[tuple[int, float]]  # steps, and the share of the coarse tokens that is fine in them
LATE = (0.4, 0.65, 0.85)  # with the default rates the last stage alone takes 0.28 of a full run
WAN_TEXT, WAN_FRAMES, WAN_SIZE = 512, 21, (90, 160)  # 81 frames of 720x1280 pixels, as latents


@cache
def _flux() -> FluxTransformer2DModel:
    with torch.device("meta"):
        return FluxTransformer2DModel(guidance_embeds=True).eval()  # the sizes of FLUX.1-dev


@cache
def _wan() -> WanTransformer3DModel:
    with torch.device("meta"):
        return WanTransformer3DModel().eval()  # the sizes of Wan 2.1 14B


def _counted(model: torch.nn.Module, **arguments: Any) -> float:
    counter = flop_counter()
    with counter, torch.no_grad():
        model(**arguments)
    return counter.get_total_flops() / 1e12


@cache
def flux(tokens: int) -> float:
    """TFLOPs of one forward on so many tokens of images."""
    model, meta = _flux(), torch.device("meta")
    return _counted(
        model,
        hidden_states=torch.empty(1, tokens, model.config.in_channels, device=meta),
        encoder_hidden_states=torch.empty(1, TEXT, model.config.joint_attention_dim, device=meta),
        pooled_projections=torch.empty(1, model.config.pooled_projection_dim, device=meta),
        timestep=torch.empty(1, device=meta),
        guidance=torch.empty(1, device=meta),
        img_ids=torch.empty(tokens, 3, device=meta),
        txt_ids=torch.empty(TEXT, 3, device=meta),
    )


@cache
def wan(frames: int, height: int, width: int) -> float:
    """TFLOPs of one forward on latents of this size."""
    model, meta = _wan(), torch.device("meta")
    return _counted(
        model,
        hidden_states=torch.empty(1, model.config.in_channels, frames, height, width, device=meta),
        timestep=torch.empty(1, device=meta),
        encoder_hidden_states=torch.empty(1, WAN_TEXT, model.config.text_dim, device=meta),
    )


def mixed(share: float) -> int:
    """Tokens of an image of which a share of the coarse tokens is fine."""
    return COARSE + 3 * int(share * COARSE)


def images() -> list[dict[str, Any]]:
    """Text to image with FLUX.1-dev at 1024x1024."""
    full = STEPS * flux(FINE)
    rows: list[tuple[str, Components]] = [("plain, 50 steps", [(STEPS, 1.0)])]
    presets = [Fresco(preset=p) for p in ("30", "18", "11", "9")] + [RALU(preset=p) for p in ("18", "10")]
    labelled = [(f"{type(m).__name__.lower()}, preset={m.preset}", m) for m in presets]
    for label, method in [*labelled, ("bottleneck, stages=9/9", Bottleneck())]:
        ends = method.promotions(torch.linspace(1, 0, method.num_inference_steps + 1), (64, 64))
        starts = [0, *(end.after for end in ends), method.num_inference_steps]
        shares = [0.0, *(end.share for end in ends)]
        rows.append((label, [(b - a, share) for (a, b), share in zip(pairwise(starts), shares, strict=True)]))
    return [
        _row("FLUX.1-dev, 1024x1024", label, sum(n * flux(mixed(share)) for n, share in parts), full, parts)
        for label, parts in rows
    ]


def edits() -> list[dict[str, Any]]:
    """Edits with FLUX.1 Kontext at 1024x1024: the tokens of the result and of the source."""
    full = STEPS * flux(2 * FINE)
    rows = [_row("FLUX.1 Kontext, 1024x1024", "plain, 50 steps", full, full, [(STEPS, 1.0)])]
    for draft, middle, final, share in ((8, 10, 2, 0.2), (8, 12, 0, 0.3), (6, 4, 2, 0.2), (8, 8, 0, 0.2)):
        parts = [(draft, 0.0), (middle, share), (final, 1.0)]
        spent = sum(n * flux(2 * mixed(part)) for n, part in parts)
        label = f"specedit, {draft} + {middle} + {final} steps, {share:.0%} of the tokens"
        rows.append(_row("FLUX.1 Kontext, 1024x1024", label, spent, full, parts))
    return rows


def videos() -> list[dict[str, Any]]:
    """Text to video with Wan 2.1 14B, for the plans of a budget that cost least and most."""
    grid, patch = (WAN_FRAMES, *WAN_SIZE), (1, 2, 2)
    full = STEPS * wan(*grid)
    rows = [_row("Wan 2.1 14B, 81 frames of 720x1280", "plain, 50 steps", full, full, [(STEPS, 1.0)])]
    for method in (DVG(budget=0.5), DVG(budget=0.3, rates=LATE)):
        budget, lengths = method.budget, stage_lengths(STEPS, method.rates)
        plans = feasible(method._candidates(grid, patch, STEPS), budget)
        spent = sorted(
            (sum(n * wan(*g) for n, g in zip(lengths, plan.grids, strict=True)), str(plan)) for plan in plans
        )
        for which, (cost, plan) in (("cheapest", spent[0]), ("dearest", spent[-1])):
            row = _row(
                "Wan 2.1 14B, 81 frames of 720x1280",
                f"dvg, budget={budget:g}, {which} plan",
                cost,
                full,
                [(STEPS, 1.0)],
            )
            rows.append(row | {"plan": plan, "plans": len(plans)})
    return rows


def _row(model: str, label: str, spent: float, full: float, parts: Components) -> dict[str, Any]:
    row = {"model": model, "method": label, "evaluations": sum(n for n, _ in parts), "tflops": round(spent, 1)}
    published = PUBLISHED.get(label) if model.startswith("FLUX.1-dev") else None
    return row | {"ratio": round(full / spent, 2)} | ({"published": published} if published else {})


def main() -> None:
    rows = images() + edits() + videos()
    write_atomically(OUT, json.dumps({"environment": environment(), "steps": STEPS, "rows": rows}, indent=1) + "\n")
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
