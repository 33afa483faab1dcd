"""Tables of the docs that are calculated, not measured: what the code says at the values that a page shows."""

from __future__ import annotations

from collections.abc import Callable

from hasten.caching import Uniform, computed_steps
from hasten.caching.predictors import hermite_coefficient, taylor_coefficient
from hasten.quality.tolerance import TIERS
from hasten.resolution.methods.dvg import DVG
from hasten.resolution.plan import choose, demands

__all__ = ["CALCULATED"]

HORIZONS = (1, 3, 5, 7)
INTERVALS = (2, 3, 4, 5, 6, 7, 8, 10, 12)
CLIP = (31, 90, 160)  # latent frames, rows and columns of 121 frames of 720x1280
CONTENTS = ((0.05, 0.05), (0.05, 0.5), (0.05, 0.8), (0.3, 0.1), (0.6, 0.1))
MEANT = {
    "exact": "comparison",
    "lossless": "what nobody tells apart side by side",
    "high": "what nobody misses when looking at one image alone",
    "draft": "previews: the composition stays",
}


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def hermite() -> str:
    """`c_1, c_2` of HiCache at four horizons, for several scales."""
    rows = []
    for sigma in (0.4, 0.5, 0.6, 0.71, 1.0):
        cells = [f"{hermite_coefficient(1, x, sigma):.2f}, {hermite_coefficient(2, x, sigma):.3f}" for x in HORIZONS]
        rows.append([f"**{sigma}**" if sigma == 0.5 else str(sigma), *cells])
    rows.append(["Taylor", *(f"{taylor_coefficient(1, x):.2f}, {taylor_coefficient(2, x):.3f}" for x in HORIZONS)])
    return _table(["`s`", *(f"x = {x}" for x in HORIZONS)], rows)


def taylor() -> str:
    """TaylorSeer's coefficients at four horizons."""
    rows = [
        [str(order), written, *(f"{taylor_coefficient(order, x):g}" for x in HORIZONS)]
        for order, written in ((1, "`x`"), (2, "`x^2 / 2`"))
    ]
    return _table(["order", "coefficient", *(f"x = {x}" for x in HORIZONS)], rows)


def intervals() -> str:
    """How many of 50 steps the uniform schedule computes, by interval."""
    counts = [len(computed_steps(Uniform(interval, 3), 50)) for interval in INTERVALS]
    rows = [
        ["computed steps", *map(str, counts)],
        ["steps / computed steps", *(f"{50 / count:.2f}" for count in counts)],
    ]
    return _table(["interval", *map(str, INTERVALS)], rows)


def dvg_plans() -> str:
    """What DVG chooses for a clip by its texture and motion."""
    plans = DVG()._candidates(CLIP, (1, 2, 2), 50)
    chosen = [choose(plans, DVG().budget, *demands(texture, motion)) for texture, motion in CONTENTS]
    return _table(
        ["texture `m_s`, motion `m_t`", *(f"{texture}, {motion}" for texture, motion in CONTENTS)],
        [["side `s`, frames `f`", *(f"{plan.spatial:g}, {plan.frames}" for plan in chosen)]],
    )


def tiers() -> str:
    """Bounds of the named qualities."""
    rows = [['`"exact"`', "every step is computed", MEANT["exact"]]]
    for name, tolerance in TIERS.items():
        bounds = f"LPIPS at most {tolerance.max_lpips:g} and PSNR at least {tolerance.min_psnr:g} dB"
        rows.append([f'`"{name}"`', bounds, MEANT[name]])
    heads = ["`quality=`", "bounds, against the full run of the same prompt and noise", "for"]
    one = next(iter(TIERS.values()))
    shared = f"Each is for {one.share:.0%} of requests with confidence {one.confidence:.0%}."
    return f"{_table(heads, rows)}\n\n{shared}"


CALCULATED: dict[str, Callable[[], str]] = {
    "hermite": hermite,
    "taylor": taylor,
    "intervals": intervals,
    "dvg-plans": dvg_plans,
    "tiers": tiers,
}
