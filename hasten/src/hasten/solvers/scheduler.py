"""`LeapScheduler`: learned times and coefficients as a diffusers scheduler that unmodified pipelines take."""

from __future__ import annotations

import os
import warnings
from collections import deque
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin, SchedulerOutput
from torch import Tensor

from hasten.calibration import Calibration
from hasten.errors import CalibrationError, ConfigError, HastenWarning, ScheduleError
from hasten.io import Limits, describe, digest_of, read_json, write_atomically
from hasten.pipeline.caller import Caller, Owner, current_owner
from hasten.pipeline.numbers import check_step, checks_all
from hasten.solvers.asked import asked_by_user, check_asked, warn_of_scale
from hasten.solvers.content import (
    LEAP,
    MORE,
    REMEDY,
    Content,
    arguments_of,
    as_json,
    check_arguments,
    refuse_other_model,
)
from hasten.solvers.formula import Formula, Learned, SecondOrder, level_at, signal
from hasten.solvers.passes import UNWATCHED, Answers, difference, mixture_of
from hasten.solvers.scales import (
    Steady,
    asked_guidance,
    check_asked_guidance,
    check_told,
    nearest,
    scale_of_run,
    scale_of_times,
)
from hasten.solvers.tables import COLUMNS, interpolated

__all__ = ["LeapScheduler"]

PASSING = ("owner", "expects_passes", "_steady")  # of the pipeline and the call under way
CONFIG = Limits(16 << 20, depth=10)
MOST_TAKEN = 1000
OWN = tuple(Content.__dataclass_fields__)


class LeapScheduler(SchedulerMixin, ConfigMixin):
    """A multistep solver with learned times and coefficients, for flow-matching and variance-preserving models.

    `pipe.scheduler = LeapScheduler.load("flux-9.safetensors", pipe)`, then `pipe(prompt, num_inference_steps=9)`. Each
    step costs one evaluation; the pipeline applies guidance as it always does. Put in by `hasten.accelerate(pipe,
    hasten.Leap(file))` it is handed what each pass says, and uses the coefficients for both.

    Args:
        tables: for each number of evaluations (as text) a `Table` as JSON.
        prediction_type: `"flow_prediction"` (the velocity of `x = (1 - s) x0 + s noise`), `"epsilon"` or
            `"v_prediction"` (variance-preserving).
        num_train_timesteps: of the model.
        shift_mu: the resolution-dependent shift that the tables belong to; None if the pipeline has none.
        guidances: the guidance scales of the fits in each table; None where the calls did not name one.
        mixtures: the weight of the first pass in the mixture for each of them, where it was seen.
        guidance: scale of runs that do not show theirs.
        noise_scale: of the noise that a run begins with.
        fingerprint: `model`, `config` and `weights` of the denoiser that the tables belong to.
        certificate: figures that were measured with the tables, as the file carries them.
        plain: configuration of the plain scheduler; its entries stand in `config` too, for `X.from_config`.
        guidance_argument: name of the argument of the pipeline's call that sets the scale; None if the fit does not
            say.
        guidance_beside: what else the calls of the fit guided by, such as `guidance_rescale`, by argument.
        interpolated_over: `"logarithm"` if tables are interpolated over that of the scale, and not over the scale.
        digest: of all these, written by `save_pretrained`; files without it are refused.

    Raises:
        ConfigError: if they are no such tables (times decrease strictly, all numbers are finite), or have another
            digest.
    """

    order = 1
    has_compatibles = True
    _compatibles: ClassVar[list[str]] = [
        *(kind.name for kind in KarrasDiffusionSchedulers),
        "FlowMatchEulerDiscreteScheduler",
    ]
    timesteps: Tensor
    sigmas: Tensor
    owner: Owner | None = None  # of the run
    expects_passes = False  # whether a hook hands the passes to `observe`
    _unwatched = False
    _steady: Steady | None = None

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        tables: dict[str, Any] | None = None,
        prediction_type: str = "flow_prediction",
        num_train_timesteps: int = 1000,
        shift_mu: float | None = None,
        guidances: list[float | None] | None = None,
        mixtures: list[float | None] | None = None,
        guidance: float | None = None,
        noise_scale: float = 1.0,
        fingerprint: dict[str, str] | None = None,
        certificate: dict[str, Any] | None = None,
        plain: dict[str, Any] | None = None,
        guidance_argument: str | None = None,
        guidance_beside: dict[str, float | None] | None = None,
        interpolated_over: str | None = None,
        digest: str | None = None,
    ) -> None:
        if not tables:
            raise ConfigError("a LeapScheduler needs tables; load one that `hasten tune` wrote with LeapScheduler.load")
        self.register_to_config(guidances=guidances or [None], mixtures=mixtures or [None])
        content = as_json({name: self.config[name] for name in OWN})
        try:
            self._checked = check_arguments(content)
            own = digest_of({name: value for name, value in content.items() if name not in MORE or value is not None})
        except ValueError as error:
            raise ConfigError(f"no usable LeapScheduler ({error}). {REMEDY}") from error
        if digest not in (None, own):
            raise ConfigError(f"this LeapScheduler was damaged or changed after it was saved. {REMEDY}")
        others = {name: value for name, value in (plain or {}).items() if name not in (*OWN, "digest")}
        self.register_to_config(digest=own, **{name: v for name, v in others.items() if not name.startswith("_")})
        self.init_noise_sigma = noise_scale
        self.taken: deque[int] = deque(maxlen=MOST_TAKEN)  # numbers of the latest evaluations, run after run
        self._choose(max(tables, key=int), self._checked.guidance)

    @classmethod
    def load(cls, path: str | Path, pipe: Any = None, guidance: float | None = None) -> Self:
        """Read the tables that `hasten tune` or `fit_leap(...).save` wrote.

        Args:
            path: the file.
            pipe: a pipeline whose denoiser is to be compared with the one that the tables were fitted to.
            guidance: the scale of runs that do not show theirs, for a file that was fitted at several.

        Raises:
            CalibrationError: if the file is damaged, no LEAP file, or belongs to another model than `pipe`'s.
            ConfigError: if the guidance scale lies outside of those that were fitted.
        """
        return cls.of(Calibration.of(LEAP, path), pipe, guidance)

    @classmethod
    def of(cls, calibration: Calibration, pipe: Any = None, guidance: float | None = None) -> Self:
        """The scheduler of a fit; see `load`."""
        scheduler = cls(**arguments_of(calibration), guidance=None if guidance is None else float(guidance))
        check_told(scheduler._checked)
        if pipe is not None:
            scheduler.check_model(pipe)
        return scheduler

    def at_guidance(self, guidance: float) -> Self:
        """The same tables for runs that do not show their guidance, at this scale.

        Raises:
            ConfigError: if it is none that was fitted for.
        """
        own = {name: as_json(self.config[name]) for name in OWN}
        made = type(self)(**own | {"guidance": float(guidance)})
        check_told(made._checked)
        return made

    def check_model(self, pipe: Any) -> None:
        """Compare the denoiser of a pipeline with the one that the tables belong to.

        Raises:
            CalibrationError: if it is another one.
        """
        refuse_other_model(self._checked.fingerprint, pipe)

    # --- its file, scheduler_config.json

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write the configuration, atomically.

        Raises:
            FileError: if it cannot be written.
        """
        write_atomically(Path(json_file_path), self.to_json_string())

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers, with an error of hasten.

        Raises:
            CalibrationError: if there is no such file, or it is damaged.
        """
        try:
            return super().load_config(pretrained_model_name_or_path, *args, **kwargs)
        except CalibrationError:
            raise
        except (OSError, ValueError) as error:
            reason = describe(error)
            raise CalibrationError(f"{pretrained_model_name_or_path}: no LeapScheduler ({reason}). {REMEDY}") from error

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str]) -> dict[str, Any]:
        content = read_json(Path(json_file), CONFIG, CalibrationError, REMEDY)
        texts = ("digest", "_class_name", "_diffusers_version")
        if not isinstance(content, dict) or not all(isinstance(content.get(name), str) for name in texts):
            raise CalibrationError(f"{json_file}: no LeapScheduler that hasten 0.2 or later saved. {REMEDY}")
        return {name: value for name, value in content.items() if name in (*OWN, *texts)}  # the rest is in `plain`

    # --- what pipelines call

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        """Choose the table; the times are the learned ones, whatever `sigmas` a pipeline proposes or a user gives.

        Raises:
            ScheduleError: if there is no table for so many evaluations, the user's sigmas begin at less noise, or the
                call asks for a guidance scale outside of what was fitted.
            CalibrationError: if the pipeline that calls has another denoiser.
        """
        asked = asked_by_user(sigmas, timesteps)
        wanted = num_inference_steps or next((len(x) for x in (sigmas, timesteps) if x is not None), None)
        count = self._checked.count(wanted, asked)
        own = self.config.shift_mu
        if mu is not None and own is not None and abs(mu - own) > 1e-3:
            warnings.warn(
                f"LEAP was fitted at another image size (shift {own:.4g}, here {mu:.4g}); fit it for this one",
                HastenWarning,
                stacklevel=2,
            )
        if (pipe := Caller().pipe) is not None:
            self.check_model(pipe)  # at every call: weights may be exchanged, and adapters loaded
        warn_of_scale(self._checked.noise_scale)
        scales = asked_guidance(self._checked)
        check_asked_guidance(scales, self._checked.guidances)
        self._choose(count, scale_of_times(self._checked, self._checked.tables[count], scales))
        self._asked: tuple[float, ...] = scales
        check_asked(asked, {"sigmas": self.sigmas, "timesteps": self.timesteps})
        self.timesteps = self.timesteps.to(device)
        self.num_inference_steps = wanted

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle has: all but the hook, and what belongs to the run under way."""
        return {name: value for name, value in vars(self).items() if name not in PASSING}

    def _choose(self, count: str, scale: float | None) -> None:
        """Take a table; `scale` is the guidance that its times are for, where they differ and it is known already."""
        self._table = self._checked.tables[count]
        self._scale = None if self._table.timesteps_by_scale is None else scale
        times, levels = self._table.timesteps, self._table.levels
        if self._scale is not None:
            axis = self._checked.axis
            times, levels = self._table.at(axis, nearest(self._scale, axis.scales), self._checked.prediction_type)
        # A new tensor for every run: what watches the pipeline tells runs apart by it.
        self.timesteps = torch.tensor(times, dtype=torch.float32)
        self._levels = [*levels, 0.0]
        kind = self._checked.prediction_type
        self.sigmas = torch.tensor(
            self._levels if kind == "flow_prediction" else [s / max(signal(s, kind), 1e-12) for s in self._levels]
        )
        self._begin_index: int | None = None
        self._step_index: int | None = None
        self._formula: Formula | None = None
        self._steady = None
        self._checks_all = False
        self._answers = Answers()
        self.expects_passes, self._unwatched = self.expects_passes and not self._unwatched, False
        self._asked = ()  # guidance scales among the arguments of the call
        self.owner = current_owner()

    @property
    def step_index(self) -> int | None:
        """The evaluation that comes next; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The evaluation at which a run starts (image-to-image)."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start a run later than at the first evaluation."""
        self._begin_index = begin_index

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """The evaluation at a timestep."""
        return int((self.timesteps.cpu() - float(timestep)).abs().argmin())

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """Nothing is scaled."""
        return sample

    def observe(self, answer: Tensor) -> None:
        """Take what one pass said; the `step` of the same call or thread makes use of it."""
        if self._step_index != len(self._table.timesteps):  # else it is made between two runs
            self._answers.add(answer)

    def unwatch(self) -> None:
        """Nobody hands passes to `observe` any more; a run under way that needs them ends with an error."""
        self._unwatched = True

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True, **_: Any
    ) -> SchedulerOutput | tuple[Tensor]:
        """One evaluation further, in float32.

        Raises:
            ScheduleError: if the passes or their guidance are not those of the fit.
            NonFiniteError: if everything is checked and a number is not finite; see `hasten.pipeline.numbers`.
        """
        if self._step_index is None:
            begin = self._begin_index
            self._step_index = self.index_for_timestep(timestep) if begin is None else begin
        k, answers = self._step_index, self._answers.take()
        if self._steady is not None:
            self._steady.check(k)
        if self._unwatched and self._needs_passes:
            raise ScheduleError(UNWATCHED)
        state, output = sample.float(), model_output.float()
        apart = difference(answers, output) if self.expects_passes else None
        if self._formula is None:
            self._formula = self._begin(k, output, answers, apart)
        if self._formula.columns == 2 and apart is None:
            raise ScheduleError(f"LEAP needs both passes at every evaluation, and at evaluation {k} there were not two")
        state = self._formula.advance(k, state, output, apart)
        self.taken.append(k)
        self._step_index += 1
        previous = state.to(model_output.dtype)
        last = self._step_index == len(self._table.timesteps)
        if last or self._checks_all:
            check_step("LEAP", k, model_output, previous, self._checks_all)
        if last:
            self._formula = self._steady = None
        return SchedulerOutput(prev_sample=previous) if return_dict else (previous,)

    @property
    def _needs_passes(self) -> bool:
        """Whether the run under way cannot go on without what each pass says."""
        if self._formula is not None:
            return self._formula.columns == 2
        unknown = len(self._checked.guidances) > 1 and self._scale is None  # the passes show it
        return self.expects_passes and (self._table.passes is not None or unknown)

    def _begin(self, k: int, output: Tensor, answers: list[Tensor], apart: Tensor | None) -> Formula:
        """The formula for a run that begins at evaluation `k`."""
        if k == len(self._table.timesteps):
            raise ScheduleError(f"LEAP has taken all {k} steps of its run; go through scheduler.timesteps alone")
        self._checks_all, self._steady = checks_all(), Steady.of_call()
        kind = self._checked.prediction_type
        if k:
            warnings.warn(
                f"this run starts at evaluation {k} of {len(self._table.timesteps)}, and LEAP's coefficients hold from "
                "the first one on: it goes on with DPM-Solver++ 2M at the learned times; for your own scheduler at "
                "this strength, call hasten.remove(pipe) or put it back",
                HastenWarning,
                stacklevel=4,
            )
            return SecondOrder(self._levels, kind)
        mixture = None if apart is None else mixture_of(answers, output, apart)
        form = "passes" if apart is not None and self._table.passes is not None else "guided"
        fits = self._table.passes if form == "passes" else self._table.guided
        assert fits is not None
        if self.expects_passes and form == "guided" and self._table.passes is not None:
            raise ScheduleError(
                "LEAP was fitted with guidance, two passes for each evaluation, and this run makes one: call the "
                "pipeline with the guidance of the fit, or fit without guidance"
            )
        if apart is not None and self._table.passes is None and set(self._checked.mixtures) == {None}:
            raise ScheduleError(
                "LEAP was fitted without guidance, one pass for each evaluation, and this run makes two: call the "
                "pipeline without guidance, or fit with it"
            )
        if self._table.timesteps_by_scale is not None and self._scale is None:
            raise ScheduleError("LEAP's times depend on the guidance: call set_timesteps before each run")
        scale, axis = scale_of_run(self._checked, mixture, self._asked, self.expects_passes, self._scale)
        return Learned(interpolated(fits, axis, scale), self._levels, kind, COLUMNS[form])

    # --- image to image

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`(1 - s) sample + s noise` (image-to-image of flow-matching pipelines)."""
        return self.add_noise(sample, noise, timestep)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise a clean sample to the level of a timestep."""
        kind = self._checked.prediction_type
        known = ([0.0, *self.timesteps.tolist()[::-1]], self._levels[::-1])
        levels = [level_at(float(t), *known, kind) for t in timesteps.flatten()]
        shape = (-1, *[1] * (noise.ndim - 1))
        noisy, clean = torch.tensor(levels).view(shape), torch.tensor([signal(s, kind) for s in levels]).view(shape)
        return clean.to(noise) * original_samples + noisy.to(noise) * noise

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)
