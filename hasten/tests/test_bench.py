"""The bench and the command line, on the trained reference model."""

import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from hasten_zoo.emoji_flux import load_emoji_flux
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hasten.bench import subject
from hasten.bench.arms import method_arms
from hasten.bench.plain import plain_arms
from hasten.bench.requests import caching_method, parse_request
from hasten.bench.result import read_result
from hasten.bench.runner import BenchSettings, run_bench
from hasten.bench.sampling import flop_counter
from hasten.bench.sheet import bench_sheet, contact_sheet
from hasten.caching import Uniform, computed_steps
from hasten.caching.methods import HiCache
from hasten.cli import main as cli
from hasten.errors import ConfigError, ModelError, UnknownNameError
from hasten.io import digest_of


@pytest.mark.parametrize("mask", [None, torch.zeros(8, 12)])
def test_operations_of_attention_are_counted_whatever_kernel_computes_it(mask):
    query, key = torch.zeros(2, 3, 8, 16), torch.zeros(2, 3, 12, 16)

    def counted(*kernels):
        with sdpa_kernel(list(kernels)), flop_counter() as counter:
            scaled_dot_product_attention(query, key, key, attn_mask=mask)
        return counter.get_total_flops()

    products = counted(SDPBackend.MATH)  # two matrix products, which PyTorch counts itself
    assert products > 0
    assert counted(SDPBackend.FLASH_ATTENTION) == products


def command(monkeypatch, capsys, *arguments):
    """Run the command; returns (exit code, standard output, standard error)."""
    monkeypatch.setattr(sys, "argv", ["hasten", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


@pytest.fixture(scope="module")
def result(emoji, tmp_path_factory):
    """One small bench: 20 steps at 32x32, two prompts."""
    out = tmp_path_factory.mktemp("bench") / "out.json"
    settings = BenchSettings(
        methods=("reuse", "hicache:order=1"),
        computed_steps=(8, 6),
        prompts=2,
        steps=20,
        call={"height": 32, "width": 32},
    )
    content = run_bench(emoji, settings, out)
    kept = json.loads(json.dumps(asdict(content)))
    assert json.loads(out.read_text()) == kept | {"digest": digest_of(kept)}
    assert read_result(out).rows[0] == content.rows[0]
    return content, out


def test_the_result_has_the_contracts_fields(result):
    content, out = result
    written = json.loads(out.read_text())
    assert written.keys() >= {"schema", "command", "environment", "model", "baseline", "rows"}
    assert written["schema"] == 2
    assert written["environment"].keys() >= {"device", "torch", "diffusers", "hasten", "commit"}
    for row in written["rows"]:
        assert row.keys() >= {
            "method", "library", "params", "steps", "computed_steps", "nfe", "flops_ratio", "steps_ratio", "seconds",
            "latency_ratio", "cache_bytes", "psnr", "ssim", "lpips", "flip", "top1", "per_prompt", "failed",
        }  # fmt: skip
        assert len(row["per_prompt"]) == 2
        for image in row["images"]:
            assert Image.open(out.parent / image).size == (32, 32)
    assert content.baseline.flops_ratio == content.baseline.latency_ratio == 1
    assert content.baseline.psnr is None


def test_plain_samplers_stand_beside_every_number_of_full_steps(result):
    content, _ = result
    counts = {row.budget for row in content.rows if row.library == "hasten"}
    for count in counts:
        plain = {row.method for row in content.rows if row.library == "plain" and row.budget == count}
        assert plain == {"euler", "unipc"}


def test_counted_operations_follow_the_computed_steps(result):
    content, _ = result
    for row in content.rows:
        assert row.computed_steps == row.nfe == row.budget  # one forward per step
        assert row.steps_ratio == pytest.approx(20 / row.budget, abs=1e-3)
        # Embeddings and final layer still run on skipped steps, so the counted ratio is a little lower.
        assert 0.8 * row.steps_ratio < row.flops_ratio <= 1.001 * row.steps_ratio


def test_errors_per_step_begin_with_zero_and_grow(result):
    content, _ = result
    for row in content.rows:
        if row.library == "plain":
            assert row.error_per_step is None
        else:
            assert len(row.error_per_step) == 20
            assert row.error_per_step[:3] == [0, 0, 0]
            assert row.error_per_step[-1] > 0


def test_the_sheet_shows_every_image(result):
    content, out = result
    count = content.rows[-1].budget
    columns = 1 + sum(row.budget == count for row in content.rows)
    sheet = bench_sheet(content, out.parent, count)
    assert sheet.width > columns * 128
    assert sheet.height > 2 * 128
    one = contact_sheet([[out.parent / content.baseline.images[0]]], ["a"], ["b|c"], side=32)
    assert one.size[0] < sheet.width


def arms(texts, counts, total):
    return method_arms([parse_request(text) for text in texts], counts, total, None)


@pytest.mark.parametrize(("n", "interval"), [(12, 5), (9, 7), (7, 10)])
def test_numbers_of_computed_steps_are_those_of_the_papers_intervals(n, interval):
    for arm in arms(["reuse", "taylorseer", "hicache"], [n], 50):
        assert (arm.computed_steps, arm.params["computed_steps"]) == (n, n)
        assert computed_steps(arm.attach.method.plan(), 50) == computed_steps(Uniform(interval, 3), 50)
    assert [arm.computed_steps for arm in plain_arms([n])] == [n, n]


@pytest.mark.parametrize(("total", "n"), [(28, 10), (20, 9), (50, 11)])
def test_a_number_is_measured_exactly_or_the_arm_says_why_not(total, n):
    uniform, even = arms(["foca", "foca:schedule=even"], [n], total)
    assert len(computed_steps(even.attach.method.plan(), total)) == even.computed_steps == n
    assert not even.error
    if uniform.error:
        assert f"cannot compute {n} of {total} steps" in uniform.error
        assert uniform.computed_steps == n
    else:
        assert len(computed_steps(uniform.attach.method.plan(), total)) == n
    with pytest.raises(ConfigError, match="cannot compute 11 of 50 steps"):
        BenchSettings(methods=("foca", "hicache"), computed_steps=(11,))  # nothing would be left to measure
    assert BenchSettings(methods=("foca", "foca:schedule=even"), computed_steps=(11,))


def test_methods_are_read_with_their_parameters():
    assert caching_method("hicache:order=1:sigma=0.7:site=module") == HiCache(order=1, sigma=0.7, site="module")
    with pytest.raises(ConfigError, match="parameter=value"):
        parse_request("hicache:order")
    with pytest.raises(UnknownNameError, match="taylorseer"):
        parse_request("taylorser")
    (arm,) = arms(["hicache"], [1], 50)
    assert "less than warmup=3" in arm.error


def test_steps_that_a_method_was_written_with_are_kept():
    listed, spaced = arms(["reuse:steps=0/1/2/4/9", "reuse:interval=4"], [3], 12)
    assert (listed.computed_steps, spaced.computed_steps) == (5, 5)
    assert listed.params["steps"] == (0, 1, 2, 4, 9)
    assert "sites" not in listed.params


def test_second_order_sampler_leaves_the_pipelines_own_in_place(emoji):
    scheduler = emoji.pipe.scheduler
    arm = next(arm for arm in plain_arms([4]) if arm.method == "unipc")
    with arm.attach(emoji.pipe):
        assert emoji.pipe.scheduler is not scheduler
        assert isinstance(emoji.pipe.scheduler, UniPCMultistepScheduler)
    assert emoji.pipe.scheduler is scheduler


# --- the command


def test_bench_and_report_commands(monkeypatch, capsys, tmp_path):
    out = tmp_path / "out.json"
    arguments = ["--methods", "taylorseer", "--computed-steps", "5", "--steps", "12", "--prompts", "1"]
    code, text, _ = command(
        monkeypatch, capsys, "bench", *arguments, "--height", "32", "--width", "32", "--guidance", "2", "--json", out
    )
    assert code == 0
    assert "taylorseer" in text
    assert json.loads(out.read_text())["settings"]["guidance"] == 2
    code, text, _ = command(monkeypatch, capsys, "report", out)
    assert code == 0
    assert "taylorseer" in out.with_suffix(".html").read_text()


def test_a_model_that_cannot_be_loaded_says_so(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="cannot load"):
        subject.open_model(str(tmp_path / "empty"))
    with pytest.raises(ModelError, match="no emoji-flux weights"):
        load_emoji_flux(tmp_path)
    with pytest.raises(UnknownNameError):
        subject.load("emoji")


# --- several processes


@pytest.mark.slow
def test_two_processes_share_the_prompts(monkeypatch, capsys, tmp_path):
    arguments = ["bench", "--methods", "taylorseer,fbcache", "--computed-steps", "5", "--steps", "12", "--prompts", "3"]
    arguments += ["--height", "32", "--width", "32", "--seed", "4", "--json"]
    script = tmp_path / "script.py"
    script.write_text("from hasten.cli.main import main\n\nmain()\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    ran = subprocess.run(
        [*map(str, launch), *arguments, str(tmp_path / "two.json")],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("figures:") == 1  # one of them reports
    assert command(monkeypatch, capsys, *arguments, tmp_path / "one.json")[0] == 0
    two, one = (json.loads((tmp_path / name).read_text()) for name in ("two.json", "one.json"))
    assert (two["settings"].pop("processes"), one["settings"].pop("processes")) == (2, 1)
    assert two["settings"] == one["settings"]
    for row, same in zip(two["rows"], one["rows"], strict=True):
        assert row["id"] == same["id"]
        assert row["computed_steps"] == same["computed_steps"]
        assert [p["seed"] for p in row["per_prompt"]] == [4, 5, 6]
        assert row["psnr"] == pytest.approx(same["psnr"], abs=1e-3)
        assert row["error_per_step"] == pytest.approx(same["error_per_step"], abs=1e-4)
        for image, again in zip(row["images"], same["images"], strict=True):
            assert (tmp_path / image).read_bytes() == (tmp_path / again).read_bytes()


# --- quality, on the trained model


def test_the_reference_model_draws_what_it_is_asked(emoji):
    prompts = emoji.prompts[:10]
    call = emoji.call | {"num_inference_steps": 20, "output_type": "pt"}
    images = emoji.pipe(prompts, generator=torch.Generator().manual_seed(0), **call).images
    assert sum(emoji.grade(images, prompts)) >= 9


@pytest.mark.slow
def test_forecasting_beats_reuse_and_the_plain_sampler_at_equal_full_steps(emoji, tmp_path):
    settings = BenchSettings(methods=("reuse", "taylorseer", "hicache", "foca"), computed_steps=(12,), prompts=6)
    rows = {row.method: row for row in run_bench(emoji, settings, tmp_path / "out.json").rows}
    for method in ("taylorseer", "hicache", "foca"):
        assert rows[method].psnr > rows["reuse"].psnr + 2
        assert rows[method].psnr > rows["euler"].psnr + 1
        assert rows[method].flip < rows["reuse"].flip
        assert rows[method].top1 >= 0.8
