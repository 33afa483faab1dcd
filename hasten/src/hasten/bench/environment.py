"""Where a result was made: device, versions, and the processes that share the work."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import hasten

if TYPE_CHECKING:
    from accelerate import PartialState

__all__ = ["environment", "load", "processes"]


def processes() -> PartialState:
    """The processes that share the work; one, unless `accelerate launch` or `torchrun` started more."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())  # it has to be told, to find processes without one


def environment() -> dict[str, str]:
    """Versions and device, as every result states them."""
    import diffusers
    import torch

    return {
        "hasten": hasten.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "device": _device(),
        "processes": str(processes().num_processes),
    }


def load() -> dict[str, str]:
    """How many processes shared the machine over the last five minutes, this one too, for a result with times; empty
    where the system does not tell."""
    return {"load": f"{os.getloadavg()[1]:.1f}"} if hasattr(os, "getloadavg") else {}


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return f"cuda: {torch.cuda.get_device_name()}"
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"cpu: {name}, {torch.get_num_threads()} threads"


@cache
def _commit() -> str:
    """Commit of hasten's source, with a plus if files differ from it; empty outside a checkout."""
    source = Path(hasten.__file__).parent

    def git(*words: str) -> str:
        ran = subprocess.run(["git", "-C", str(source), *words], capture_output=True, text=True, check=True, timeout=10)
        return ran.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(hasten.__file__).name)  # or it is installed into somebody's repository
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return ""
