"""SpecEdit: draft an edit in small, verify where it differs from the source, compute only that at full size.

"SpecEdit", arXiv:2605.02152. A run has three parts, with `sigma` the noise level before a step and `sigma'` after it:

    draft    all tokens coarse, and those of the source image, too
    verify   D = discrepancy(x0, source) for every coarse token, x0 = x - sigma v; S = selected tokens, dilated by one;
             U = an evenly spread coverage set. S and U are promoted: x' = (1 - sigma') Up(x0) + sigma' E
    mixed    fine tokens in S and U; the rest coarse and held on their way to the source, v = (x - source) / sigma.
             Halfway D is taken again from what the model would have done; what exceeds it now is promoted, too
    final    the composite: fine tokens in S, the source elsewhere, blended over a ring; noised, and denoised at full
             size
    restore  the source again, except in fine tokens of S whose x0, at the end of the mixed part, was farther from it
             than that of the coverage set, which no edit touches: |x0 - source|^2 > 4 Q95 over U

`E` is the pipeline's own noise, and the draft begins with its low-pass.

The paper's abstract and conclusion are all that this rests on; selectors, guards, promotion, locking and the composite
are a reconstruction (perceptual distance and locking as in SpotEdit, arXiv:2512.22323). Departures:
    the coverage set's own result stays out of the composite unless `keep_cover`, since it was verified as unchanged;
    a global edit (more tokens selected than the bound, or a median token that has changed by half of its size, which
    the subtraction of the median hides) is promoted as a whole, and nothing is locked;
    the last line of the list above is ours: S is dilated and coarse, so that most of it is not edited, and the final
    steps denoise the whole image again.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from hasten.errors import ConfigError, HastenWarning
from hasten.parameters import Range
from hasten.pipeline.scheduler import NoiseLevels
from hasten.registry import method
from hasten.resolution.discrepancy import (
    Discrepancy,
    above_floor,
    discrepancy,
    global_shift,
    has_features,
    median_change,
    resized,
)
from hasten.resolution.engine import ResolutionMethod
from hasten.resolution.packed import MixedState, PackedEngine, PackedRun, check_even, check_total
from hasten.resolution.positions import TokenSet, Units, children, pack, unpack
from hasten.resolution.report import ResolutionRecord
from hasten.resolution.seams import blend, locked_velocity
from hasten.resolution.select import EditMap, Selector, changed_tokens, dilate, everything, select

__all__ = ["EditMap", "EditRecord", "SpecEdit", "SpecEditEngine"]

Reference = Literal["mix", "lr", "hr"]
By = Literal["pixels", "latents"]
PartName = Literal["draft", "mixed", "final"]


@method("specedit", kind="resolution", paper="SpecEdit, arXiv:2605.02152")
@dataclass(frozen=True, kw_only=True)
class SpecEdit(ResolutionMethod):
    """Draft an edit in small and compute at full size only what it changes (SpecEdit).

    Call the pipeline with `num_inference_steps=draft + mixed + final`.
    """

    draft: Annotated[int, Range(0), "steps with coarse tokens; 0 is the plain pipeline, with mixed=0"] = 8
    mixed: Annotated[int, Range(0), "steps with fine tokens where the edit is"] = 10
    final: Annotated[int, Range(0), "steps at full size at the end, which repair seams"] = 2
    discrepancy: Annotated[
        Discrepancy, "distance to the source: features of the VAE's decoder (latents, where it has none), or latents"
    ] = "perceptual"
    floor: Annotated[bool, "whether the image's median is subtracted from the discrepancy"] = True
    selector: Annotated[Selector, "how the tokens of the edit are told from the others"] = "two-means"
    threshold: Annotated[float, Range(0), "least discrepancy of a selected token, with selector='threshold'"] = 0.2
    share: Annotated[float, Range(above=0, most=1), "share of the tokens, with selector='top'"] = 0.2
    bounds: Annotated[
        tuple[float, float], Range(0, 1), "least and largest share of selected tokens; with more the edit is global"
    ] = (0.05, 0.6)
    global_change: Annotated[
        float | None,
        Range(above=0),
        "change of the median token, relative to the source's root mean square, that makes an edit global; None: never",
    ] = 0.5
    coverage: Annotated[
        int | None, Range(1), "one token in so many along rows and columns is promoted wherever it lies; None for none"
    ] = 4
    cover_init: Annotated[Literal["source", "draft"], "clean estimate that promoted coverage tokens begin with"] = (
        "source"
    )
    keep_cover: Annotated[bool, "whether the coverage tokens' own result is kept"] = False
    reference: Annotated[
        Reference, "source tokens in the mixed part: fine where the image's are (mix), all coarse (lr), all fine (hr)"
    ] = "mix"
    lock: Annotated[bool, "whether the rest is held to the source; otherwise it is the enlarged coarse result"] = True
    restore: Annotated[
        bool, "whether what differs from the source no more than unedited tokens is the source again at the end"
    ] = True
    reverify: Annotated[bool, "whether the locked tokens are verified again halfway through the mixed part"] = True
    ring: Annotated[Literal[0, 1], "width of the blend around the selected tokens, in coarse tokens"] = 1
    units: Annotated[Units, "frame of the positions in the mixed part: that of fine tokens, or of coarse ones"] = (
        "hr_units"
    )
    enlarge: Annotated[By, "how a clean estimate is enlarged: latent pixels copied, or decoded, resized, encoded"] = (
        "latents"
    )
    shrink: Annotated[By, "how the source is shrunk: the mean of 2x2 latents, or decoded, resized, encoded"] = "pixels"
    source: Annotated[int, Range(0), "number of the reference image that is edited, from 0"] = 0

    def check(self) -> None:
        super().check()
        if self.draft == 0 and self.mixed:
            raise ConfigError("without a draft there is nothing to verify: give draft=1 or more, or mixed=0 as well")
        if not self.num_inference_steps:
            raise ConfigError("draft, mixed and final are all 0; a run needs steps")
        if self.bounds[0] > self.bounds[1]:
            raise ConfigError(f"bounds must not fall, such as (0.05, 0.6), got {self.bounds}")

    @property
    def num_inference_steps(self) -> int:
        """Steps of a run."""
        return self.draft + self.mixed + self.final

    def engine(self, pipe: Any) -> SpecEditEngine:
        return SpecEditEngine(pipe, self)


@dataclass(frozen=True, kw_only=True)
class EditRecord(ResolutionRecord):
    """One sampler step; see `ResolutionRecord`.

    Attributes:
        part: `"draft"`, `"mixed"` or `"final"`; a global edit has no mixed part.
        coarse: coarse tokens of the image that the transformer ran on, the mean over the batch.
        fine: fine tokens, likewise.
        locked: coarse tokens that were held to the source, likewise.
    """

    part: PartName
    coarse: int
    fine: int
    locked: int

    @property
    def stage_name(self) -> str:
        return self.part


@dataclass(frozen=True)
class _Source:
    """A reference image: size of its coarse grid, coarse tokens `[B, n, C]` and fine ones `[B, 4 n, C]`."""

    size: tuple[int, int]
    coarse: Tensor
    fine: Tensor

    @property
    def fine_size(self) -> tuple[int, int]:
        """Rows and columns of the fine grid of tokens."""
        return 2 * self.size[0], 2 * self.size[1]

    def of(self, image: int) -> _Source:
        """That of one image of the batch."""
        return _Source(self.size, self.coarse[image : image + 1], self.fine[image : image + 1])


@dataclass(kw_only=True)
class EditRun(PackedRun):
    """What is remembered of the call under way.

    Attributes:
        sources: the reference images.
        found: which of the engine's plans is that of an image of the batch.
        kept: `[2 h, 2 w]` bool, an image's fine tokens that are not the source again at the end.
    """

    sources: list[_Source] = field(default_factory=list)
    found: dict[int, int] = field(default_factory=dict)
    kept: dict[int, Tensor] = field(default_factory=dict)


class SpecEditEngine(PackedEngine[EditRun, EditRecord, EditMap]):
    """Runs one editing pipeline as `SpecEdit` says; see `ResolutionEngine`.

    Args:
        pipe: a `FluxKontextPipeline`, `QwenImageEditPipeline` or `QwenImageEditPlusPipeline`.
        method: what to do.
    """

    pipelines: ClassVar[tuple[str, ...]] = (
        "FluxKontextPipeline",
        "QwenImageEditPipeline",
        "QwenImageEditPlusPipeline",
    )
    method: SpecEdit

    def __init__(self, pipe: Any, method: SpecEdit) -> None:
        super().__init__(pipe, method)
        self._kind: Discrepancy = method.discrepancy
        if self._kind == "perceptual" and not has_features(pipe.vae):
            self._kind = "latent"
            warnings.warn(
                f"{type(pipe.vae).__name__} has no learned decoder, and SpecEdit compares latents instead; "
                "give discrepancy='latent' to say so yourself",
                HastenWarning,
                stacklevel=3,
            )

    def begin_tokens(
        self, number: int, levels: NoiseLevels, grids: Sequence[tuple[int, int]], hidden: Tensor
    ) -> EditRun:
        method, split = self.method, f"{self.method.draft} + {self.method.mixed} + {self.method.final}"
        check_total(self.name, split, method.num_inference_steps, len(levels))
        if len(grids) < 2 + method.source:
            raise ConfigError(
                f"SpecEdit edits reference image {method.source}, but the call has {len(grids) - 1}; give image=..."
            )
        run = EditRun(number=number, levels=levels, grids=grids)
        if method.draft:
            check_even(self.name, grids)
            noise, *references = hidden.split([rows * columns for rows, columns in grids], 1)
            run.states = [MixedState.begin(own, grids[0], self.pixels) for own in noise.split(1)]
            for tokens, size in zip(references, grids[1:], strict=True):
                wanted = grids[0] if len(run.sources) == method.source else size
                run.sources.append(self._source(unpack(tokens, size), wanted))
        return run

    def _source(self, latents: Tensor, size: tuple[int, int]) -> _Source:
        """A reference in both sizes; `size` is that of the fine grid of tokens that is wanted."""
        if latents.shape[2:] != (2 * size[0], 2 * size[1]):
            latents = resized(self.pipe, latents, (2 * size[0], 2 * size[1]))
        fine = pack(latents)
        pixels = self.method.shrink == "pixels"
        coarse = pack(resized(self.pipe, latents, size)) if pixels else self.pixels.shrink(fine, size)
        return _Source((size[0] // 2, size[1] // 2), coarse, fine)

    def units(self, run: EditRun, own: TokenSet) -> Units:
        return self.method.units if run.step >= self.method.draft else "lr_units"

    def reference_sets(self, run: EditRun, own: TokenSet) -> Sequence[TokenSet]:
        mixed, reference = run.step >= self.method.draft, self.method.reference
        return [
            own
            if mixed and reference == "mix" and number == self.method.source
            else TokenSet(own.fine.new_full(source.size, mixed and reference == "hr"))
            for number, source in enumerate(run.sources)
        ]

    def reference_tokens(self, run: EditRun, hidden: Tensor) -> Sequence[tuple[Tensor, Tensor]]:
        return [(source.coarse, source.fine) for source in run.sources]

    def record(self, run: EditRun, common: dict[str, Any]) -> EditRecord:
        coarse, fine = run.counts
        mixed = run.coarse and run.step >= self.method.draft
        part: PartName = "mixed" if mixed else "draft" if coarse else "final"
        locked = coarse if mixed and self.method.lock else 0
        return EditRecord(**common, part=part, coarse=coarse, fine=fine, locked=locked)

    def move(self, run: EditRun, image: int, velocity: tuple[Tensor, Tensor]) -> None:
        method, done, source = self.method, run.step + 1, run.sources[self.method.source].of(image)
        state, (coarse, fine) = run.states[image], velocity
        sigma, after = run.levels[run.step], run.levels[run.step + 1]
        clean, fine_clean = state.coarse - sigma * coarse, state.fine - sigma * fine
        if method.lock and run.step >= method.draft:
            coarse = locked_velocity(state.coarse, source.coarse, sigma)
        state.move(coarse, fine, after - sigma)
        if done == method.draft:
            self._verify(run, image, source, clean, after)
        elif state.complete:  # a global edit, beside one that is not
            return
        elif done == method.draft + method.mixed:
            found = self.plans[run.found[image]]
            if method.restore and method.lock:
                own = state.tokens.fine if method.keep_cover else found.edited
                run.kept[image] = changed_tokens(fine_clean, source.fine, own, state.tokens.fine)
            self._complete(found, state, source, clean, fine_clean, after)
        elif method.lock and method.reverify and done == method.draft + (method.mixed + 1) // 2:
            self._verify_again(run, image, source, clean, fine_clean, after)

    def finish(self, run: EditRun, latents: Tensor) -> Tensor:
        """The source again wherever the edit changed nothing."""
        if not run.kept:
            return latents
        rows = list(latents.split(1))
        for image, kept in run.kept.items():
            source = run.sources[self.method.source].of(image)
            own = unpack(rows[image].float(), source.fine_size)
            restored = blend(own, unpack(source.fine, source.fine_size), kept, ring=1)
            rows[image] = pack(restored).to(latents.dtype)
        return torch.cat(rows)

    def _verify(self, run: EditRun, image: int, source: _Source, clean: Tensor, sigma: float) -> None:
        """Compare the draft with the source and promote what the edit touches."""
        method, state, enlarged = self.method, run.states[image], self._enlarged(clean, source.size)
        if method.mixed == 0:
            state.promote(torch.ones_like(state.tokens.fine), enlarged, sigma)
            return
        draft, wanted = unpack(clean, source.size), unpack(source.coarse, source.size)
        scores = self._distance(clean, source)
        if method.global_change is None or float(median_change(draft, wanted)) < method.global_change:
            selection = select(
                scores, method.selector, threshold=method.threshold, share=method.share, bounds=method.bounds
            )
        else:
            selection = everything(scores)
        found = EditMap.of(run.number, image, scores, selection, method.coverage)
        run.found[image] = len(self.plans)
        self.plans.append(found)
        if found.everywhere and method.share < 1:
            moved = global_shift(draft, wanted)[0]
            warnings.warn(
                "the edit touches most of the image and is computed at full size everywhere; the draft is most like "
                f"the source moved by {moved} coarse latent pixels (down, right)",
                HastenWarning,
                stacklevel=2,
            )
        if not found.everywhere and method.cover_init == "source":
            enlarged = torch.where(children(found.fine & ~found.edited), source.fine, enlarged)
        state.promote(found.fine, enlarged, sigma)

    def _verify_again(
        self, run: EditRun, image: int, source: _Source, clean: Tensor, fine_clean: Tensor, sigma: float
    ) -> None:
        """Promote locked tokens that the model would have changed as much as those that were selected."""
        state, number = run.states[image], run.found[image]
        found, small = self.plans[number], self.pixels.shrink(fine_clean, source.fine_size)
        clean = torch.where(state.tokens.fine.reshape(-1, 1), small, clean)
        reverified = (self._distance(clean, source) > found.cut) & ~state.tokens.fine
        if bool(reverified.any()):
            state.promote(dilate(reverified) & ~state.tokens.fine, self._enlarged(clean, source.size), sigma)
            self.plans[number] = replace(found, fine=state.tokens.fine, reverified=reverified)

    def _complete(
        self, found: EditMap, state: MixedState, source: _Source, clean: Tensor, fine_clean: Tensor, sigma: float
    ) -> None:
        """The composite, noised to `sigma`, in the place of all tokens."""
        size = source.fine_size
        outer = source.fine if self.method.lock else self._enlarged(clean, source.size)
        if self.method.keep_cover or not self.method.lock:
            outer = torch.where(children(state.tokens.fine & ~found.edited), fine_clean, outer)
        inner = torch.where(children(state.tokens.fine), fine_clean, outer)
        inside = found.chosen | found.reverified if self.method.ring else found.edited
        composite = blend(unpack(inner, size), unpack(outer, size), inside, self.method.ring)
        state.promote(torch.ones_like(state.tokens.fine), pack(composite), sigma)

    def _distance(self, clean: Tensor, source: _Source) -> Tensor:
        """Discrepancy `[h, w]` of an image's coarse clean tokens and the source."""
        distance = discrepancy(
            self._kind, self.pipe.vae, unpack(clean, source.size), unpack(source.coarse, source.size)
        )
        return (above_floor(distance) if self.method.floor else distance)[0]

    def _enlarged(self, clean: Tensor, size: tuple[int, int]) -> Tensor:
        """Clean coarse tokens as fine ones."""
        if self.method.enlarge == "latents":
            return self.pixels.enlarge(clean, size)
        return pack(resized(self.pipe, unpack(clean, size), (4 * size[0], 4 * size[1])))
