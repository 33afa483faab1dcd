"""The table of our caches beside those of other libraries, from the files of three benchmarks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from hasten.bench.row import Row
from leads import paired

from page_tables.common import ROOT, cell, read, result_of, table_row
from page_tables.judged import arm_title, interval

OURS, PEER, PLAIN = "hasten", "peer", "plain"
AS_MANY = 1.1  # times our operations: more than that, and the best of those that stay below has a line too
NO_CACHES = ("leap", "leapcache")  # what learns from runs of the model is compared on pages of its own
FASHION = "fashion-dit"
UNMARKED = "peer:"  # before the arms of other libraries in files of scripts


@dataclass(frozen=True)
class Measured:
    """An arm at a number of computed steps.

    Attributes:
        name: as the table shows it.
        whose: `OURS`, `PEER` or `PLAIN`.
        psnr: dB to the full run of each prompt, or their mean alone.
        flops: operations per image, NaN where they are not counted.
        looks: perceptual distance, less is nearer; None where it is not measured.
    """

    name: str
    whose: str
    psnr: tuple[float, ...]
    flops: float
    looks: float | None

    @property
    def mean(self) -> float:
        """PSNR over the prompts."""
        return statistics.fmean(self.psnr)


@dataclass(frozen=True)
class Group:
    """All arms of one model, guidance and number of computed steps."""

    model: str
    guidance: float
    count: int
    arms: tuple[Measured, ...]

    def best(self, whose: str, most: float = math.inf) -> Measured | None:
        """The arm with the highest mean, of those with at most so many operations."""
        some = (arm for arm in self.arms if arm.whose == whose and not arm.flops > most)
        return max(some, key=lambda arm: arm.mean, default=None)


def peers_table(benches: list[str], styles: list[str], fashion: str) -> str:
    """Markdown of the best of ours, of other libraries' and of plain samplers, a line per model, guidance and number of
    computed steps at which all three are measured.

    Args:
        benches: results of `hasten bench`, without their endings.
        styles: files of `styles.py`.
        fashion: the file of `fashion.py`, whose images are not kept one by one.
    """
    heads = ["model", "guidance", "computed steps", "best cache of ours", "dB", "best of other libraries", "dB"]
    heads += ["ours ahead by (95 %)", "its operations to ours", "perceptual distance, ours", "theirs"]
    heads += ["best plain sampler", "dB", "ours ahead by (95 %)"]
    lines = [table_row(heads), "|---|--:|--:|---|--:|---|" + "--:|" * 5 + "---|--:|--:|"]
    for group in _groups(benches, styles, fashion):
        own, plain = group.best(OURS), group.best(PLAIN)
        if own is None or plain is None:
            continue
        peers = dict.fromkeys(group.best(PEER, most) for most in (math.inf, AS_MANY * own.flops))
        lines += [_line(group, own, peer, plain) for peer in peers if peer is not None]
    told = (
        "Mean PSNR to the full run, without LEAP and what stands on it; the best of each kind by that mean, and how "
        "many of ours were measured there; mean "
        "leads, with intervals by a paired bootstrap over prompts where images are compared one by one. Perceptual "
        "distance: LPIPS to the full run; fashion-dit: Frechet distance to real images. Thresholds of gates are "
        "those that compute as many steps."
    )
    return "\n".join([*lines, "", told])


def _line(group: Group, own: Measured, peer: Measured, plain: Measured) -> str:
    digits = 2 if group.model == FASHION else 4
    cells = [group.model, "-" if group.guidance == 1 else f"{group.guidance:g}", str(group.count)]
    measured = sum(arm.whose == OURS for arm in group.arms)
    cells += [f"{own.name} (of {measured})", cell(own.mean, 1), peer.name, cell(peer.mean, 1), _ahead(own, peer)]
    cost = peer.flops / own.flops
    cells += [cell(None if math.isnan(cost) else cost, 2), *(cell(arm.looks, digits) for arm in (own, peer))]
    return table_row([*cells, plain.name, cell(plain.mean, 1), _ahead(own, plain)])


def _ahead(own: Measured, other: Measured) -> str:
    if len(own.psnr) == 1:
        return f"{own.mean - other.mean:+.1f}"
    lead = paired([a - b for a, b in zip(own.psnr, other.psnr, strict=True)])
    return f"{lead['mean']:+.1f} {interval(lead, 1)}"


def _groups(benches: list[str], styles: list[str], fashion: str) -> Iterator[Group]:
    there = (ROOT / "benchmarks").glob("*.json")
    known = {file.name for file in there}
    for name in (name for name in benches if f"{name}.json" in known):
        yield from _of_bench(result_of(name))
    for name in (name for name in styles if name in known):
        yield from _of_styles(read(name))
    if fashion in known:
        yield from _of_fashion(read(fashion))


def _of_bench(result: Any) -> Iterator[Group]:
    rows = [row for row in result.rows if row.psnr is not None and not _learns(row.method)]
    for count in dict.fromkeys(row.budget for row in rows):
        arms = tuple(_of_row(row) for row in rows if row.budget == count)
        yield Group(result.model, result.settings.guidance or 1, count, arms)


def _of_row(row: Row) -> Measured:
    whose = row.library if row.library in (OURS, PLAIN) else PEER
    psnr = tuple(float(one["psnr"]) for one in row.per_prompt)
    name = f"**{row.name}**" if whose == OURS else row.name
    return Measured(name, whose, psnr, math.nan if row.flops is None else row.flops, row.lpips)


def _of_styles(result: dict[str, Any]) -> Iterator[Group]:
    rows = {name: row for name, row in result["rows"].items() if "full_psnr" in row.get("figures", {})}
    split = {name: name.partition("@") for name in rows}

    def looks(name: str) -> float | None:
        return rows[name]["means"].get("full_lpips")

    for count in sorted({int(count) for _, _, count in split.values() if count}, reverse=True):
        arms = [
            Measured(arm_title(arm), whose, tuple(rows[name]["figures"]["full_psnr"]), rows[name]["flops"], looks(name))
            for name, (arm, _, steps) in split.items()
            if steps == str(count) and (whose := _whose(arm, result["plain"])) is not None
        ]
        yield Group("emoji-styles", result["guidance"], count, tuple(arms))


def _of_fashion(result: dict[str, Any]) -> Iterator[Group]:
    rows = [row for row in result["rows"] if "frechet" in row and row["arm"] != "full"]
    plain = {row["arm"] for row in rows if row["arm"].partition(":")[0] in ("euler", "unipc", "dpmpp")}
    for scale, count in dict.fromkeys((row["guidance"], row["computed_steps"]) for row in rows):
        arms = [
            Measured(arm_title(row["arm"]), whose, (row["psnr"],), row["flops"], row["frechet"])
            for row in rows
            if (row["guidance"], row["computed_steps"]) == (scale, count)
            and (whose := _whose(row["arm"], plain)) is not None
        ]
        yield Group(FASHION, scale, count, tuple(arms))


def _whose(arm: str, plain: Iterable[str]) -> str | None:
    """Who an arm of a script's file belongs to; None where it is no cache and no plain sampler."""
    if arm in plain:
        return PLAIN
    if arm.startswith(UNMARKED):
        return PEER
    return None if _learns(arm) or arm.startswith("turbo ") else OURS


def _learns(arm: str) -> bool:
    return arm.partition(":")[0] in NO_CACHES
