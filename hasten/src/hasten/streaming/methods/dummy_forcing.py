"""Dummy Forcing: heads that attend to the present alone need no past. "Dummy Forcing", arXiv:2601.20499.

Once, early in the rollout, each head's attention mass on the first frame, on the rest of the history and on the current
chunk is measured with a sample of the queries. The share `dummy_share` of all heads of all layers with the most mass on
the current chunk become dummy heads: they attend to the last `local` frames and the current chunk, nothing else. The
others attend to the first frame and the last `history` frames.

Departures: the paper's three kinds of heads with packed calls are two here, because heads of one kind make one batch in
any case. Heads are measured in the first forward of chunk `begin` and are split before its second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from hasten.parameters import Range
from hasten.registry import method
from hasten.streaming.method import LayerView, StreamingMethod
from hasten.streaming.methods.sliding_window import recency, sink_and_window
from hasten.streaming.scores import attention_mass
from hasten.streaming.selection import Selection, frames_at, ranked

__all__ = ["DummyForcing"]

SAME = 2.0**-16  # masses that differ by less differ by rounding


@method("dummy-forcing", kind="streaming", paper="Dummy Forcing, arXiv:2601.20499")
@dataclass(frozen=True, kw_only=True)
class DummyForcing(StreamingMethod):
    """Half of the heads attend to the present alone, the others to a window and the first frame (Dummy Forcing)."""

    dummy_share: Annotated[float, Range(0, 1), "share of all heads that attend to the present alone"] = 0.5
    local: Annotated[int, Range(0), "frames of history that these heads attend to"] = 1
    history: Annotated[int | None, Range(0), "last frames for the other heads, beside the first; None for all"] = 9
    begin: Annotated[int, Range(1), "chunks of history at which the heads are measured; before, all attend to all"] = 1
    samples: Annotated[int, Range(1), "queries to measure with"] = 64

    @property
    def refresh_every(self) -> int | None:
        return 1  # heads are split while chunk `begin` is under way; looking that up costs nothing

    def score(self, view: LayerView, queries: Tensor) -> Tensor:
        return recency(view, queries, 1)

    def select(self, view: LayerView, queries: Tensor, keys: Tensor) -> Selection | None:
        if view.chunk < self.begin:
            return None
        measured = view.shared.setdefault("mass", {})
        if view.layer not in measured:
            own = keys.shape[1] * keys.shape[2]
            measured[view.layer] = attention_mass(queries, keys, view.cache.stored[0], own, self.samples)
            return None
        if len(measured) < view.layers:
            return None
        if "split" not in view.memo:
            dummies = view.shared.setdefault("dummies", _highest(measured, self.dummy_share))[view.layer]
            view.memo["split"] = self._split(view, queries, dummies)
        split: Selection = view.memo["split"]
        return split

    def _split(self, view: LayerView, queries: Tensor, dummies: set[int]) -> Selection:
        B, H, frames = queries.shape[0], queries.shape[3], view.cache.frames
        far = len(frames) if self.history is None else self.history
        kinds = (
            ([h for h in range(H) if h in dummies], sink_and_window(frames, 0, self.local)),
            ([h for h in range(H) if h not in dummies], sink_and_window(frames, 1, far)),
        )
        groups = tuple(frames_at(positions, heads, B, queries.device) for heads, positions in kinds if heads)
        return Selection(groups, len(frames))


def _highest(mass: dict[int, Tensor], share: float) -> dict[int, set[int]]:
    """Heads of each layer that are among the `share` of all heads with the highest mass; equal ones by their order."""
    heads = [(layer, head) for layer in sorted(mass) for head in range(len(mass[layer]))]
    order = ranked(torch.cat([mass[layer] for layer in sorted(mass)]), SAME)
    chosen: dict[int, set[int]] = {layer: set() for layer in mass}
    for place in order[: round(share * len(heads))].tolist():
        layer, head = heads[place]
        chosen[layer].add(head)
    return chosen
