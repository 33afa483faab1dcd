"""Forcing-KV: static heads keep a short context, dynamic heads keep what moves. "Forcing-KV", arXiv:2605.09681.

Once, early in the rollout, each head's attention mass on the last `recent` frames (the current chunk counted in) is
measured. Heads with a mass of `threshold` or more are static: they attend to the first frame and the last `context`
frames. The others are dynamic: of the frames in between they attend only to the patches (bands of tokens) that changed
most against the frame before, by the cosine of their keys; the share `retention` of them.

Departures: "style" because the official code was read, not ported. Which patches changed is found on the first layer's
keys and shared by all layers, as there. Heads are measured when the history first has more frames than `recent`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from hasten.errors import ConfigError
from hasten.parameters import Range
from hasten.registry import method
from hasten.streaming.method import LayerView, StreamingMethod
from hasten.streaming.methods.sliding_window import recency, sink_and_window
from hasten.streaming.scores import attention_mass
from hasten.streaming.selection import HeadGroup, Selection, frames_at, ranked

__all__ = ["ForcingKV", "changed_patches"]

EPSILON = 1e-6
SAME = 2.0**-16  # similarities that differ by less differ by rounding


def changed_patches(plain_keys: Tensor, patches: int, kept: int) -> Tensor:
    """The `kept` patches of each frame that differ most from the same patch of the frame before, `[B, F - 1, kept]`.

    Args:
        plain_keys: `[B, H, F, L, D]`; `patches` must divide `L`.
    """
    keys = plain_keys.float().movedim(1, 3).flatten(3)  # [B, F, L, H * D]
    similarity = cosine_similarity(keys[:, 1:], keys[:, :-1], dim=-1, eps=EPSILON)  # [B, F - 1, L]
    similarity = similarity.unflatten(2, (patches, -1)).mean(3)
    return ranked(-similarity, SAME)[..., :kept].sort(dim=2).values


@method("forcing-kv", kind="streaming", paper="Forcing-KV, arXiv:2605.09681")
@dataclass(frozen=True, kw_only=True)
class ForcingKV(StreamingMethod):
    """Static heads attend to a short context, dynamic heads to the patches that changed (Forcing-KV style)."""

    threshold: Annotated[float, Range(0, 1), "attention mass on recent frames from which on a head is static"] = 0.8
    recent: Annotated[int, Range(1), "frames that count as recent, the current chunk counted in"] = 4
    context: Annotated[int, Range(0), "last frames that all heads attend to whole, beside the first"] = 3
    patches: Annotated[int, Range(1), "bands into which the tokens of a frame are cut; must divide their number"] = 8
    retention: Annotated[
        float, Range(above=0, most=1), "share of the patches that dynamic heads attend to in the other frames"
    ] = 0.33
    samples: Annotated[int, Range(1), "queries to measure with"] = 64

    def score(self, view: LayerView, queries: Tensor) -> Tensor:
        return recency(view, queries, 1)

    def select(self, view: LayerView, queries: Tensor, keys: Tensor) -> Selection | None:
        if keys.shape[2] % self.patches:
            raise ConfigError(
                f"the {keys.shape[2]} tokens of a frame cannot be cut into {self.patches} equal patches; "
                "choose a number that divides them"
            )
        if len(view.cache) <= max(self.recent, self.context + 1):
            return None
        if "mass" not in view.notes:
            recent = min(self.recent, len(view.cache) + keys.shape[1]) * keys.shape[2]
            view.notes["mass"] = attention_mass(queries, keys, view.cache.keys, recent, self.samples)
        static = view.notes["mass"] >= self.threshold
        B, H = queries.shape[0], queries.shape[3]
        whole = sink_and_window(view.cache.frames, 1, self.context)
        kinds = [[h for h in range(H) if static[h]], [h for h in range(H) if not static[h]]]
        groups = [frames_at(whole, kinds[0], B, queries.device)] if kinds[0] else []
        if kinds[1]:
            groups.append(self._dynamic(view, kinds[1], whole, B))
        return Selection(tuple(groups), len(view.cache))

    def _dynamic(self, view: LayerView, heads: list[int], whole: list[int], batch: int) -> HeadGroup:
        """All frames: those of `whole` as they are, the others in part."""
        held, tokens, device = len(view.cache), view.cache.tokens, view.cache.keys.device
        kept = max(1, round(self.retention * self.patches))
        patches = self._shared_patches(view, kept)  # [B, F - 1, kept]; row i is of frame i + 1
        between = [position for position in range(1, held) if position not in whole]
        within = torch.arange(tokens // self.patches, device=device)
        rows = patches[:, [position - 1 for position in between]]
        starts = torch.tensor(between, device=device)[None, :, None] * tokens + rows * (tokens // self.patches)
        parts = (starts[..., None] + within).flatten(1)  # [B, tokens of the parts]
        full = torch.tensor(whole, device=device)[:, None] * tokens + torch.arange(tokens, device=device)
        chosen = torch.cat([full.flatten().expand(batch, -1), parts], 1).sort(dim=1).values
        n = len(heads)
        frames = torch.arange(held, device=device).expand(batch, 1, n, held)
        return HeadGroup(tuple(heads), frames, chosen[:, None, None].expand(batch, 1, n, -1))

    def _shared_patches(self, view: LayerView, kept: int) -> Tensor:
        """Found by the first layer of a chunk that needs them and used by the others."""
        found = view.shared.get("patches")
        if found is None or found[0] != view.chunk:
            found = view.chunk, changed_patches(view.cache.plain_keys(), self.patches, kept)
            view.shared["patches"] = found
        positions: Tensor = found[1]
        return positions
