"""Recording for `hasten calibrate`, call by call, so that one that was cut short goes on where it stopped."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hasten.calibration import Fingerprint, Trace
from hasten.errors import CalibrationError
from hasten.fitting.calibrate import merge, record
from hasten.io import Kind, digest_of, read_tensors, write_tensors

__all__ = ["Recording"]

BETWEEN = "|"  # pass and slot in the name of a tensor


@dataclass(frozen=True)
class _Content:
    """Beside the features of one call: what they belong to, and their types, which numpy does not all have."""

    fingerprint: Fingerprint
    dtypes: dict[str, Literal["float16", "bfloat16", "float32", "float64"]]


KIND = Kind("recorded call", _Content, CalibrationError, "Delete it to record it again.", 4 << 30)


class Recording:
    """Features of a model's calls, kept in a folder until `remove`.

    Args:
        folder: holds a folder of its own for every recording.
        identity: all that decides the features, as plain data.
        site: where features are taken.
        tokens: how many tokens of a feature are kept.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], site: str, tokens: int) -> None:
        digest = digest_of({**identity, "site": site, "tokens": tokens})
        self._folder, self._site, self._tokens = folder / f".recording-{digest[:12]}", site, tokens

    def run(
        self, pipe: Any, calls: Sequence[tuple[int, Mapping[str, Any]]], progress: Callable[[int, int], None]
    ) -> Trace:
        """Record calls, each with its number; those that are recorded already are not run again.

        Raises:
            KeyboardInterrupt: with a line on how to go on.
        """
        traces = []
        try:
            for number, call in calls:
                file = self._folder / f"{number:04d}.safetensors"
                if file.exists():
                    traces.append(_read(file))
                else:
                    traces.append(record(pipe, [call], site=self._site, tokens=self._tokens))
                    _write(traces[-1], file)
                progress(len(traces), len(calls))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{len(traces)} of {len(calls)} runs are kept in {self._folder}; the same command goes on from there"
            ) from None
        return merge(traces)

    def remove(self) -> None:
        """Delete what is kept: the fits are written."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _write(trace: Trace, file: Path) -> None:
    tensors = {
        f"{name}{BETWEEN}{slot}": tensor for name, slots in trace.features.items() for slot, tensor in slots.items()
    }
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    content = {"fingerprint": asdict(trace.fingerprint), "dtypes": dtypes}
    write_tensors(file, KIND, {name: tensor.float().numpy() for name, tensor in tensors.items()}, content)


def _read(file: Path) -> Trace:
    tensors, content = read_tensors(file, KIND)
    if tensors.keys() != content.dtypes.keys() or not all(BETWEEN in name for name in tensors):
        raise CalibrationError(f"{file}: its tensors are not those of its header. {KIND.remedy}")
    features: dict[str, dict[str, Tensor]] = {}
    for name, dtype in content.dtypes.items():
        pass_name, _, slot = name.partition(BETWEEN)
        features.setdefault(pass_name, {})[slot] = torch.from_numpy(tensors[name]).to(getattr(torch, dtype))
    return Trace(features, content.fingerprint)
