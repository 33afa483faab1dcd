"""`LeapScheduler`: learned times and coefficients as a diffusers scheduler that unmodified pipelines take."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from hasten.calibration import Calibration, declare_contents
from hasten.errors import CalibrationError, ConfigError, HastenWarning, ScheduleError
from hasten.io import Array, Limits, conform, decreasing, describe, digest_of, read_json, write_atomically
from hasten.parameters import Declared
from hasten.registry import method
from hasten.solvers.multistep import advance

__all__ = ["LEAP", "Leap", "LeapScheduler"]

LEAP = "leap"  # what a calibration of this scheduler is called
Table = Mapping[str, Any]
CONFIG = Limits(16 << 20, depth=8)
REMEDY = "Make it again with `hasten tune`."


@dataclass(frozen=True)
class _Solver:
    """The table for one number of evaluations, as JSON holds it."""

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    coefficients: tuple[tuple[float, ...], ...]

    def check(self, count: int) -> None:
        """Raise ValueError for a table that is none of `count` evaluations."""
        sizes = (len(self.timesteps), len(self.sigmas), len(self.coefficients))
        if set(sizes) != {count} or any(len(row) != k + 1 for k, row in enumerate(self.coefficients)):
            raise ValueError(f"the table for {count} evaluations does not have {count} times and rows of 1 to {count}")
        for name in ("timesteps", "sigmas"):
            if complaint := decreasing(np.asarray(getattr(self, name))):
                raise ValueError(f"{name} of the table for {count} evaluations: {complaint}")
        if self.sigmas[-1] <= 0 or self.timesteps[-1] < 0:
            raise ValueError(f"the last time of the table for {count} evaluations must be before the end of the run")


@dataclass(frozen=True)
class _Config:
    """What a `LeapScheduler` is made of, as JSON holds it."""

    tables: dict[str, _Solver]
    prediction_type: Literal["flow", "epsilon", "v_prediction"]
    num_train_timesteps: int
    shift_mu: float | None

    def __post_init__(self) -> None:
        if not self.tables:
            raise ValueError("it has no table")
        for count, solver in self.tables.items():
            if not (count.isascii() and count.isdigit() and count == str(int(count))):
                raise ValueError(f"a table is for {count!r} evaluations, expected a number")
            solver.check(int(count))
        if self.num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps is {self.num_train_timesteps}, expected at least 1")


def _tables(calibration: Calibration) -> dict[str, dict[str, Any]]:
    tables: dict[str, dict[str, Any]] = {}
    for name, tensor in calibration.tensors.items():
        count, _, field = name.partition("/")
        rows = tensor.tolist()
        if field == "coefficients":
            rows = [row[: k + 1] for k, row in enumerate(rows)]
        tables.setdefault(count, {})[field] = rows
    return tables


def _arguments(calibration: Calibration) -> dict[str, Any]:
    """Arguments of the scheduler of a fit."""
    names = ("prediction_type", "num_train_timesteps", "shift_mu")
    return {"tables": _tables(calibration), **{name: calibration.options.get(name) for name in names}}


def _check_fit(calibration: Calibration) -> None:
    for name, tensor in calibration.tensors.items():
        if name.endswith("/coefficients") and bool(tensor.triu(1).any()):
            raise ValueError(f"{name!r} makes use of later evaluations")
    conform(_plain(_arguments(calibration)), _Config, "the fit")


declare_contents(
    LEAP,
    {
        "{n}/coefficients": Array("float", ("n", "n")),
        "{n}/timesteps": Array("float", ("n",)),
        "{n}/sigmas": Array("float", ("n",)),
    },
    _check_fit,
)


def _plain(value: Any) -> Any:
    """Mappings and sequences as JSON knows them: diffusers freezes what it keeps."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


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
        digest: of all these, written by `save_pretrained`; files without it are refused.

    Raises:
        ConfigError: if they are no such tables (times decrease strictly, all numbers are finite), or have another
            digest.
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
        digest: str | None = None,
    ) -> None:
        if not tables:
            raise ConfigError("a LeapScheduler needs tables; load one that `hasten tune` wrote with LeapScheduler.load")
        content = _plain(
            {
                "tables": tables,
                "prediction_type": prediction_type,
                "num_train_timesteps": num_train_timesteps,
                "shift_mu": shift_mu,
            }
        )
        try:
            conform(content, _Config, "the configuration")
        except ValueError as error:
            raise ConfigError(f"no usable LeapScheduler ({error}). {REMEDY}") from error
        own = digest_of(content)
        if digest not in (None, own):
            raise ConfigError(f"this LeapScheduler was damaged or changed after it was saved. {REMEDY}")
        self.register_to_config(digest=own)
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
        return cls(**_arguments(calibration))

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
        return content

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
