"""The sum behind every forecast: right in every dtype and shape, whichever way it takes."""

import os
import subprocess
import sys
import types

import pytest
import torch

from hasten.caching import sums
from hasten.caching.gates import relative_change
from hasten.caching.sums import add_into, inner_product, magnitude, weighted_sum

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WEIGHTS = [[1.0], [0.0, 0.0], [2.5], [9.0, -8.0], [4.0, 0.0, -6.0, 3.0], [0.1 * k - 0.5 for k in range(12)]]


def features(count, dtype, shape=(2, 37, 24)):
    return [torch.randn(shape, generator=torch.Generator().manual_seed(k)).to(dtype) for k in range(count)]


def exact(values, weights):
    return sum(
        f.double() * (w.double() if isinstance(w, torch.Tensor) else w) for f, w in zip(values, weights, strict=True)
    )


def close(ours, theirs):
    step = torch.finfo(ours.dtype).eps
    return bool(((ours.double() - theirs).abs() <= 2 * step * theirs.abs() + 64 * torch.finfo(torch.float32).eps).all())


@pytest.mark.parametrize("weights", WEIGHTS, ids=len)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_exact_to_the_features_rounding_and_new(monkeypatch, dtype, weights):
    values = features(len(weights), dtype)
    kept = [value.clone() for value in values]
    for chunk in (1 << 16, 100, 1):  # all at once, some rows, one row
        monkeypatch.setitem(sums.CHUNK, "cpu", chunk)
        ours = weighted_sum(values, weights)
        assert ours.dtype == dtype
        assert close(ours, exact(values, weights))
        ours.fill_(7)
        assert all(map(torch.equal, values, kept))


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_channel_may_have_weights_of_its_own(monkeypatch, dtype):
    values, weights = (
        features(3, dtype),
        [torch.randn(24, generator=torch.Generator().manual_seed(9 + k)) for k in range(3)],
    )
    for chunk in (1 << 16, 100):
        monkeypatch.setitem(sums.CHUNK, "cpu", chunk)
        assert close(weighted_sum(values, weights), exact(values, weights))


def test_what_weighs_nothing_is_not_read():
    spoiled = torch.full((1, 4, 8), float("nan"))
    assert torch.equal(weighted_sum([torch.ones(1, 4, 8), spoiled], [2.0, 0.0]), torch.full((1, 4, 8), 2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_sum_is_the_same_and_takes_other_weights_without_a_new_graph(dtype):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(weighted_sum, backend=backend, fullgraph=True)
    values = features(3, dtype)
    for weights in ([4.0, -5.0, 2.0], [1.5, 0.25, -0.75]):
        assert close(compiled(values, list(torch.tensor(weights))), exact(values, weights))
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_add_into_works_in_place_where_the_result_fits():
    total = torch.ones(2, 3, dtype=torch.bfloat16)
    assert add_into(total, torch.ones(2, 3, dtype=torch.bfloat16)) is total
    wider = add_into(total, torch.full((2, 3), 0.5))
    assert (wider.dtype, float(wider[0, 0]), float(total[0, 0])) == (torch.float32, 2.5, 2.0)


def test_inner_products_and_magnitudes_keep_what_half_precision_would_lose():
    a, b = (value.flatten() for value in features(2, torch.bfloat16, (300, 1000)))
    assert float(inner_product(a, b)) == pytest.approx(float(a.double() @ b.double()), abs=1e-4)
    assert inner_product(a, b).dtype == torch.float64
    many = torch.ones(2, 70_000, dtype=torch.bfloat16)
    assert magnitude(many).tolist() == 140_000
    assert magnitude(many, per_sample=True).tolist() == [70_000, 70_000]
    assert relative_change(1.5 * many, many, lambda s: s) == pytest.approx(0.5)


def test_the_kernel_is_not_asked_for_where_it_cannot_run(monkeypatch):
    assert not sums.fused_on(torch.device("cpu"))
    monkeypatch.setattr(sums, "find_spec", lambda name: None)
    assert not sums.fused_on(torch.device("cuda", 7))


def test_a_kernel_that_fails_is_left_out_with_a_warning(monkeypatch):
    monkeypatch.setattr(sums, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "hasten.caching.kernel", None)  # importing it raises
    with pytest.warns(sums.HastenWarning, match="summed in chunks"):
        assert not sums.fused_on.__wrapped__(torch.device("cuda"))


KERNEL = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_sums import WEIGHTS, close, exact, features
from hasten.caching.kernel import MOST, fused_sum
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for weights in [w for w in WEIGHTS if 0 < len(w) <= MOST] + [[0.5] * MOST]:
        values = features(len(weights), dtype)
        assert close(fused_sum(values, weights), exact(values, weights)), (dtype, weights)
    values, vectors = features(3, dtype), [torch.randn(24) for _ in range(3)]
    assert close(fused_sum(values, vectors), exact(values, vectors)), dtype
print("same")
"""


def test_the_kernel_does_the_same_in_tritons_interpreter():
    pytest.importorskip("triton")
    code, environment = KERNEL.format(tests=os.path.dirname(__file__)), {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr


def test_the_kernel_compiles_for_numbers_and_for_channels():
    """The interpreter runs Python, which forgives what the compiler does not; compiling needs no GPU."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from hasten.caching import kernel

    for channels in (False, True):
        for dtype in ("fp32", "bf16", "fp16"):
            signature = {"out": f"*{dtype}", **{f"f{i}": f"*{dtype}" for i in range(kernel.MOST)}}
            signature |= {f"w{i}": "*fp32" if channels else "fp32" for i in range(kernel.MOST)}
            signature |= {"size": "i32", "width": "i32", **dict.fromkeys(("K", "CHANNELS", "BLOCK"), "constexpr")}
            constants = {"K": kernel.MOST, "CHANNELS": channels, "BLOCK": 1024}
            built = compile(ASTSource(kernel._sum, signature, constants), target=GPUTarget("cuda", 90, 32))
            assert "ld.global" in built.asm["ptx"]


def test_a_kernel_that_cannot_weight_channels_is_left_out(monkeypatch):
    """Triton 3.6 on an H200 summed with numbers, and failed at the first vector, in the middle of a run."""

    def numbers_alone(features, weights):
        if isinstance(weights[0], torch.Tensor):
            raise TypeError("invalid operands of type pointer<fp32> and triton.language.float32")
        return sums._chunked(list(zip(features, weights, strict=True)))

    line = torch.linspace(-1, 1, 96)
    monkeypatch.setattr(sums, "find_spec", lambda name: object())
    monkeypatch.setattr(torch, "linspace", lambda *args, device: line)  # there may be no such device here
    monkeypatch.setitem(sys.modules, "hasten.caching.kernel", types.SimpleNamespace(fused_sum=numbers_alone))
    with pytest.warns(sums.HastenWarning, match="pointer"):
        assert not sums.fused_on.__wrapped__(torch.device("cuda"))
