"""Streaming at Wan 2.1 1.3B's shape, 60 latent frames: back-ends of attention, choosing, memory, end to end."""

from __future__ import annotations

from typing import Any

import torch
from causal import TINY, Size, causal_video, rolled_out
from harness import Bench
from hasten.streaming import BACKENDS, FocusedForcing, FullHistory, KVStream, SlidingWindow, StreamingMethod

FRAMES = 60
BUDGET = 5  # of 57 frames of history at the end; Self-Forcing's window is 21 frames with 7.6 of them visible
METHODS: dict[str, StreamingMethod] = {
    "full history": FullHistory(),
    "focused forcing": FocusedForcing(budget=BUDGET, diversity_tokens=32),
    "focused forcing, per frame": FocusedForcing(budget=BUDGET, diversity_tokens=32, choice="frame"),
    "sliding window": SlidingWindow(window=BUDGET - 1),
}


def measure(bench: Bench) -> None:
    """Whole rollouts first; compiling one of the back-ends may take all of the time."""
    end_to_end(bench)
    backends(bench)


def backends(bench: Bench) -> None:
    """One layer's forward with a long history, by every back-end that runs here."""
    size = TINY if bench.dry else Size()
    history = 6 if bench.dry else FRAMES - size.chunk
    generator = torch.Generator().manual_seed(0)

    def drawn(frames: int) -> torch.Tensor:
        shape = (1, frames, size.tokens, size.heads, size.head_width)
        dtype = torch.bfloat16 if bench.device.on_gpu else torch.float32
        return torch.randn(shape, generator=generator).to(bench.device.name, dtype)

    past, now = (drawn(history), drawn(history)), [drawn(size.chunk) for _ in range(3)]
    results: dict[str, torch.Tensor] = {}
    for backend in ("full", *BACKENDS):
        if backend == "flex" and not bench.has_time(40, "back-end flex"):
            continue
        method = METHODS["full history" if backend == "full" else "focused forcing"]
        chosen: Any = "grouped" if backend == "full" else backend
        try:
            stream = KVStream(method, 1, backend=chosen)
            stream[0].append(*past)
            first = bench.device.median_ms(lambda s=stream: s.attend(0, *now), repeats=1, warmups=0)
            ms = bench.device.median_ms(lambda s=stream: s.attend(0, *now), repeats=3 if bench.dry else 10)
            results[backend] = stream.attend(0, *now)
        except Exception as error:  # a back-end that is not installed, or does not run here
            bench.failed(f"back-end {backend}", error)
            continue
        bench.row(f"back-end {backend}", first_ms=first, ms=ms, work_ratio=stream.stats().work_ratio)
    for backend in results.keys() - {"full", "masked"}:
        if "masked" in results:
            error = float((results[backend] - results["masked"]).abs().max())
            bench.row(f"back-end {backend}", largest_difference=error)
            bench.holds(f"back-end {backend} agrees with the masked one", error <= 2e-2)


def end_to_end(bench: Bench) -> None:
    """Whole rollouts: all methods in turn, and choosing by itself."""
    model = causal_video(bench.device, bench.dry)
    chunks = (18 if bench.dry else FRAMES) // model.size.chunk
    for name, method in METHODS.items():
        if not bench.has_time(15, name):
            continue
        try:
            rolled_out(model, KVStream(method, model.size.layers), 3)  # whatever is slow the first time
            roll_out(bench, model, name, method, chunks)
        except Exception as error:
            bench.failed(name, error)
    rows = {name: bench.rows.get(name, {}) for name in METHODS}
    full, own = rows["full history"], rows["focused forcing"]
    if "total_ms" in full and "total_ms" in own:
        bench.target("end to end, times faster", full["total_ms"] / own["total_ms"], 1.48, "more")
        bench.target("choosing, share of attention", own.get("choosing"), 0.03)


def roll_out(bench: Bench, model: Any, name: str, method: StreamingMethod, chunks: int) -> None:
    """One method: once without looking, once with times of its parts, which cost a little."""
    bench.device.free()
    before = bench.device.held()
    bench.device.reset_peak()
    stream = KVStream(method, model.size.layers)
    start = bench.device.stamp()
    rolled_out(model, stream, chunks)
    end = bench.device.stamp()
    bench.device.wait()
    peak = bench.device.peak()
    stats = stream.stats()
    bench.row(
        name,
        total_ms=bench.device.between(start, end),
        work_ratio=stats.work_ratio,
        kv_ratio=stats.full_kv_bytes / stats.kv_bytes,
        cache_bytes=stats.cache_bytes,
        peak_bytes=None if peak is None or before is None else peak - before,
    )
    stream.reset()
    timed = KVStream(method, model.size.layers)
    rolled_out(model, timed, chunks)
    bench.row(name, choosing=timed.stats().overhead)
