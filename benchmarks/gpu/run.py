"""What only a GPU can show, in one command; see README.md beside this file.

    python benchmarks/gpu/run.py --out DIR --minutes 8      on a GPU
    python benchmarks/gpu/run.py --out DIR --dry-run        tiny shapes on a CPU: that everything runs

Sections in order of worth: flux, exact, resolution, streaming, training. Each writes DIR/<section>.json as it goes;
what is done already is skipped, and the failure of one ends no other. The exit code is 0 where all of them are done.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import exact
import flux
import resolution
import streaming
import torch
import training
from harness import Device, Plan, run_sections

PLANS = (
    Plan("flux", flux.measure, 0.50),
    Plan("exact", exact.measure, 0.10),
    Plan("resolution", resolution.measure, 0.20),
    Plan("streaming", streaming.measure, 0.12),
    Plan("training", training.measure, 0.08),
)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all sections together")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--sections", nargs="+", choices=[plan.name for plan in PLANS], help="only these")
    parser.add_argument(
        "--training-data", type=Path, default=Path("runs/emoji-styles"), help="folder of emoji-styles' data and latents"
    )
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; give --dry-run to try everything with tiny shapes on the CPU")
    device = Device("cpu" if options.dry_run else "cuda")
    torch.set_grad_enabled(False)
    plans = [plan for plan in PLANS if options.sections is None or plan.name in options.sections]
    extra = {"training_data": options.training_data}
    statuses = run_sections(plans, options.out, device, options.dry_run, options.minutes, extra)
    return int(any(status != "done" for status in statuses.values()))


if __name__ == "__main__":
    raise SystemExit(main())
