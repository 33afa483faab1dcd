"""`LeapScheduler`: learned times and coefficients as a diffusers scheduler that unmodified pipelines take."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from hasten.calibration import Calibration
from hasten.errors import CalibrationError, ConfigError, HastenWarning, ScheduleError
from hasten.parameters import Declared
from hasten.registry import method
from hasten.solvers.multistep import advance

__all__ = ["LEAP", "Leap", "LeapScheduler"]

LEAP = "leap"  # what a calibration of this scheduler is called
Table = Mapping[str, Any]


class LeapScheduler(SchedulerMixin, ConfigMixin):
    """A multistep solver with learned times and coefficients, for flow-matching and variance-preserving models.

    `pipe.scheduler = LeapScheduler.load("flux-9.safetensors")`, then `pipe(prompt, num_inference_steps=9)`. Each step
    costs one evaluation; the pipeline applies guidance as it always does.

    Args:
        tables: for each number of evaluations (as text) `{"timesteps": [n], "sigmas": [n], "coefficients": [[1], [2],
            ..., [n]]}`; row `k` says how far to have moved along each velocity after evaluation `k`.
        prediction_type: `"flow"` (the velocity of `x = (1 - sigma) x0 + sigma noise`), `"epsilon"` or `"v_prediction"`
            (variance-preserving; `sigma` is then noise over signal).
        num_train_timesteps: of the model.
        shift_mu: the resolution-dependent shift that the tables belong to; None if the pipeline has none.
    """

    order = 1
    init_noise_sigma = 1.0
    timesteps: Tensor
    sigmas: Tensor

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        tables: dict[str, Any] | None = None,
        prediction_type: str = "flow",
        num_train_timesteps: int = 1000,
        shift_mu: float | None = None,
    ) -> None:
        if not tables:
            raise ConfigError("a LeapScheduler needs tables; load one that `hasten tune` wrote with LeapScheduler.load")
        if prediction_type not in ("flow", "epsilon", "v_prediction"):
            raise ConfigError(f"prediction_type must be 'flow', 'epsilon' or 'v_prediction', got {prediction_type!r}")
        for count, table in tables.items():
            sizes = {len(table["timesteps"]), len(table["sigmas"]), len(table["coefficients"]), int(count)}
            if len(sizes) != 1 or any(len(row) != k + 1 for k, row in enumerate(table["coefficients"])):
                raise ConfigError(
                    f"the table for {count} evaluations does not have {count} times and rows of 1 to {count}"
                )
        self._choose(max(tables, key=int))

    @classmethod
    def load(cls, path: str | Path, pipe: Any = None) -> Self:
        """Read the tables that `hasten tune` or `fit_leap(...).save` wrote.

        Args:
            path: the file.
            pipe: a pipeline whose model is to be compared with the one that the tables were fitted to.

        Raises:
            CalibrationError: if the file is damaged, no LEAP file, or belongs to another model than `pipe`'s.
        """
        return cls.of(Calibration.of(LEAP, path), pipe)

    @classmethod
    def of(cls, calibration: Calibration, pipe: Any = None) -> Self:
        """The scheduler of a fit; see `load`."""
        if pipe is not None:
            differences = calibration.check_model(pipe.transformer)
            if differences:
                raise CalibrationError(f"leap: {'; '.join(differences)}. Fit again with `hasten tune`")
        tables: dict[str, dict[str, Any]] = {}
        for name, tensor in calibration.tensors.items():
            count, _, field = name.partition("/")
            rows = tensor.tolist()
            if field == "coefficients":
                rows = [row[: k + 1] for k, row in enumerate(rows)]
            tables.setdefault(count, {})[field] = rows
        options = calibration.options
        return cls(tables, options["prediction_type"], options["num_train_timesteps"], options["shift_mu"])

    # --- what pipelines call

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        """Choose the table; the times are the learned ones, whatever `sigmas` a pipeline proposes.

        Raises:
            ScheduleError: if there is no table for so many evaluations.
        """
        wanted = num_inference_steps or next((len(x) for x in (sigmas, timesteps) if x is not None), None)
        if str(wanted) not in self.config.tables:
            known = ", ".join(sorted(self.config.tables, key=int))
            raise ScheduleError(
                f"LEAP was fitted for {known} evaluations, not for {wanted}; use num_inference_steps={known}"
            )
        own = self.config.shift_mu
        if mu is not None and own is not None and abs(mu - own) > 1e-3:
            warnings.warn(
                f"LEAP was fitted at another image size (shift {own:.4g}, here {mu:.4g}); fit it for this one",
                HastenWarning,
                stacklevel=2,
            )
        self._choose(str(wanted))
        self.timesteps = self.timesteps.to(device)
        self.num_inference_steps = wanted

    def _choose(self, count: str) -> None:
        self._table: Table = self.config.tables[count]
        # A new tensor for every run: what watches the pipeline tells runs apart by it.
        self.timesteps = torch.tensor(self._table["timesteps"], dtype=torch.float32)
        self.sigmas = torch.tensor([*self._table["sigmas"], 0.0], dtype=torch.float32)
        self._begin_index: int | None = None
        self._step_index: int | None = None
        self._velocities: list[Tensor | None] = []

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

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True, **_: Any
    ) -> SchedulerOutput | tuple[Tensor]:
        """One evaluation further: `x_{k+1} = x_k + sum_j (c_kj - c_{k-1,j}) v_j` in float32."""
        if self._step_index is None:
            self._step_index = self._begin_index or self.index_for_timestep(timestep)
            self._velocities = [None] * self._step_index
        k = self._step_index
        state, velocity = self._scaled(sample.float(), model_output.float(), k)
        self._velocities.append(velocity)
        rows = self._table["coefficients"]
        state = advance(state, self._velocities, rows[k], rows[k - 1] if k else ())
        if self.config.prediction_type != "flow":
            state = state / (1 + self.sigmas[k + 1].to(state.device) ** 2).sqrt()
        self._step_index += 1
        if self._step_index == len(rows):
            self._velocities = []
        previous = state.to(model_output.dtype)
        return SchedulerOutput(prev_sample=previous) if return_dict else (previous,)

    def _scaled(self, sample: Tensor, output: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """State and velocity in the variables in which the plain sampler is linear."""
        if self.config.prediction_type == "flow":
            return sample, output
        sigma = self.sigmas[k].to(sample.device)
        alpha = 1 / (1 + sigma**2).sqrt()
        if self.config.prediction_type == "v_prediction":
            output = alpha * output + sigma * alpha * sample
        return sample / alpha, output

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`(1 - sigma) sample + sigma noise` (image-to-image of flow-matching pipelines)."""
        return self.add_noise(sample, noise, timestep)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise a clean sample to the level of a timestep."""
        levels = self.sigmas[[self.index_for_timestep(t) for t in timesteps.flatten()]].to(noise)
        sigma = levels.view(-1, *[1] * (noise.ndim - 1))
        if self.config.prediction_type == "flow":
            return (1 - sigma) * original_samples + sigma * noise
        return (original_samples + sigma * noise) / (1 + sigma**2).sqrt()

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)


@method(LEAP, kind="solver", paper="ours", needs_calibration=True)
@dataclass(frozen=True)
class Leap(Declared):
    """Sample with learned times and coefficients in place of the pipeline's scheduler (LEAP)."""

    calibration: Annotated[Calibration | str | None, "what `hasten tune` or `fit_leap` learned"] = None

    def check(self) -> None:
        object.__setattr__(self, "calibration", Calibration.of(LEAP, self.calibration))

    def scheduler(self, pipe: Any = None) -> LeapScheduler:
        """The scheduler to put in place of the pipeline's own; see `LeapScheduler.load`."""
        assert isinstance(self.calibration, Calibration)
        return LeapScheduler.of(self.calibration, pipe)
