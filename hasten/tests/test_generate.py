"""`hasten generate`: jobs read, drawn, refused; what is there is left out; killed at any time, it goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from pipelines import draw, make_pipe
from subjects import install

import hasten
from hasten.bench import subject
from hasten.bench.sheet import to_pil
from hasten.bench.subject import Edit, Subject
from hasten.cli import main
from hasten.errors import ConfigError, ModelError
from hasten.integrations.batch import Job, Worker, generate, overridden, read_jobs
from hasten.quality.configuration import Configuration

CALL = {"height": 32, "width": 32, "max_sequence_length": 8, "num_inference_steps": 8}
FOCA = Configuration(method="foca:schedule=even", computed_steps=4)


def tiny():
    return Subject("tiny", make_pipe(), ["red apple"], dict(CALL))


def worker(configuration=FOCA):
    return Worker(configuration, model=tiny())


JOBS = [Job(f"job-{i}", prompt, seed=i) for i, prompt in enumerate(("red apple", "blue car", "cat"))]


def test_each_image_is_what_the_call_gives_with_its_provenance(tmp_path):
    own = worker()
    assert generate(own, JOBS, tmp_path) == []
    for job in JOBS:
        image = to_pil(own.draw(job)[0])
        from PIL import Image

        assert list(Image.open(tmp_path / f"{job.id}.png").getdata()) == list(image.getdata())
        known = json.loads((tmp_path / f"{job.id}.json").read_text())
        assert known["job"]["seed"] == job.seed
        assert known["summary"]["computed_steps"] == 4
        assert known["setting"]["method"].startswith("foca")
        assert known["transformers"]["transformer"]["weights"]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json"] * 3 + [".png"] * 3


def test_without_a_setting_nothing_is_accelerated(tmp_path):
    pipe = make_pipe()
    right = draw(pipe, steps=8, seed=3, output_type="pt")[0]
    found, provenance = Worker(Configuration(), model=tiny()).draw(Job("a", "red apple", seed=3))
    assert torch.equal(found, right)
    assert provenance["summary"]["computed_steps"] == 8


def test_a_job_has_its_own_setting_and_call(tmp_path):
    own = worker()
    _, provenance = own.draw(Job("a", "cat", steps=6, computed_steps=3))
    assert (provenance["summary"]["steps"], provenance["summary"]["computed_steps"]) == (6, 3)
    guided, provenance = own.draw(Job("a", "cat", guidance=3.0, quality="exact"))
    right = draw(make_pipe(), steps=8, prompt="cat", true_cfg_scale=3.0, negative_prompt="", output_type="pt")[0]
    assert torch.equal(guided, right)
    assert provenance["summary"]["passes"] == ("cond", "uncond")


def test_what_is_there_is_left_out_and_what_is_of_another_setting_is_refused(tmp_path):
    generate(worker(), JOBS[:2], tmp_path)
    before = (tmp_path / "job-0.png").stat().st_mtime_ns
    seen = []
    generate(worker(), JOBS, tmp_path, lambda done, total, label: seen.append((done, total, label)))
    assert (tmp_path / "job-0.png").stat().st_mtime_ns == before
    assert seen == [(2, 3, "job-2"), (3, 3, "job-2")]
    for other in (
        lambda: generate(worker(overridden(FOCA, computed_steps=5)), JOBS, tmp_path),
        lambda: generate(worker(), [Job("job-0", "a dog")], tmp_path),
        lambda: generate(worker(), [Job("job-0", "red apple", steps=6)], tmp_path),
    ):
        with pytest.raises(ConfigError, match=r"job-0\.png was made of another job"):
            other()


def test_an_image_without_its_whole_provenance_is_refused_and_provenance_alone_is_made_again(tmp_path):
    generate(worker(), JOBS[:1], tmp_path)
    (tmp_path / "job-0.json").write_text("{")
    with pytest.raises(ConfigError, match="made of another job"):
        generate(worker(), JOBS[:1], tmp_path)
    (tmp_path / "job-0.png").unlink()
    assert generate(worker(), JOBS[:1], tmp_path) == []
    assert (tmp_path / "job-0.png").exists()


def test_an_image_that_was_cut_or_swapped_since_is_refused(tmp_path):
    generate(worker(), JOBS[:2], tmp_path)
    image = tmp_path / "job-0.png"
    assert generate(worker(), JOBS[:1], tmp_path) == []
    for content in (image.read_bytes()[:100], (tmp_path / "job-1.png").read_bytes()):
        image.write_bytes(content)
        with pytest.raises(ConfigError, match=r"job-0\.png was made of another job.*or changed since"):
            generate(worker(), JOBS[:1], tmp_path)
    image.unlink()
    image.mkdir()
    with pytest.raises(ConfigError, match="changed since"):
        generate(worker(), JOBS[:1], tmp_path)


def test_leap_and_resolution_methods_are_for_all_jobs(emoji):
    leap = Configuration(method=f"leap:calibration={emoji.fitted['leap']}", steps=5)
    image, provenance = Worker(leap, model=emoji).draw(Job("a", "red apple", seed=3))
    hasten.remove(emoji.pipe)
    with hasten.accelerate(emoji.pipe, hasten.Leap(emoji.fitted["leap"])):
        call = emoji.call | {"num_inference_steps": 5, "generator": torch.Generator().manual_seed(3)}
        right = emoji.pipe("red apple", **call, output_type="pt").images[0]
    assert torch.equal(image, right)
    assert provenance["setting"]["method"].startswith("leap")
    assert provenance["summary"]["computed_steps"] == 5
    with pytest.raises(ConfigError, match="for all calls alike"):
        Worker(leap, model=emoji).draw(Job("a", "red apple", computed_steps=7))
    hasten.remove(emoji.pipe)


def test_jobs_that_cannot_be_had_are_named_before_anything_is_drawn(tmp_path):
    own = worker()
    own.model.pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("something was drawn"))
    bad = [Job("high", "cat", quality="high"), Job("odd", "cat", height=33), Job("nine", "cat", computed_steps=9)]
    with pytest.raises(ConfigError) as refused:
        generate(own, [JOBS[0], *bad], tmp_path)
    for text in ("3 of 4 jobs cannot be done, and nothing was drawn", "high: quality 'high' is not certified",
                 "odd: --height must be", "nine: 9 of 8 steps cannot be computed"):  # fmt: skip
        assert text in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_jobs_outside_of_a_certificate_are_named_before_anything_is_drawn(emoji, tmp_path):
    own = Worker(Configuration(quality="high"), model=emoji)
    with pytest.raises(ConfigError, match=r"2 of 3 jobs.*b: .*for 50 steps, this call has 20.*c: .*for height 64"):
        generate(own, [Job("a", "cat"), Job("b", "cat", steps=20), Job("c", "cat", height=32, width=32)], tmp_path)
    hasten.remove(emoji.pipe)


def test_prompts_that_have_no_image_to_edit_are_named_before_anything_is_drawn(tmp_path):
    pipe = make_pipe()
    image, everywhere = torch.zeros(3, 32, 32), torch.ones(32, 32, dtype=torch.bool)
    edits = [Edit("make it red", image, image, everywhere, "global")]
    own = Worker(FOCA, model=Subject("edits", pipe, ["make it red"], dict(CALL), edits=edits))
    known, other = Job("a", "make it red"), Job("b", "make it blue")
    assert [bool(reason) for reason in own.reasons([known, other, replace(known, id="c")])] == [False, True, False]
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("something was drawn"))
    with pytest.raises(ConfigError, match=r"1 of 2 jobs cannot be done, and nothing was drawn.*none for the p"):
        generate(own, [known, other], tmp_path)


def test_a_streaming_model_is_refused_as_what_it_is():
    for name in subject.streaming_names():
        with pytest.raises(ConfigError, match=f"{name} streams video, which `hasten bench`"):
            subject.open_model(name)


def test_a_folder_whose_files_describe_no_pipeline_is_one_line(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ModelError, match=r"cannot load the pipeline .*: KeyError, '_class_name'"):
        subject.open_model(str(tmp_path))


def test_a_quality_that_takes_precedence_takes_no_audit_that_it_cannot_have():
    audited = Configuration(quality="high", audit=0.1)
    assert overridden(audited, quality="draft").audit == 0.1
    assert overridden(audited, quality="exact") == Configuration(quality="exact")
    with pytest.raises(ConfigError, match="quality exact has none"):
        overridden(audited, quality="exact", audit=0.1)


def test_a_job_that_fails_while_it_is_drawn_does_not_keep_the_others(tmp_path, monkeypatch):
    own = worker()
    plain = own.draw

    def draw(job):
        if job.id == "job-1":
            raise ConfigError("what shows when it is drawn")
        return plain(job)

    monkeypatch.setattr(own, "draw", draw)
    assert [one.id for one in generate(own, JOBS, tmp_path)] == ["job-1"]
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == ["job-0", "job-2"]


def test_jobs_are_prompts_or_objects(tmp_path):
    file = tmp_path / "jobs.jsonl"
    file.write_text('a red apple\n\n{"id": 7, "prompt": "b", "seed": 2, "quality": "exact"}\n{"prompt": "c"}\n')
    assert read_jobs(file, 10) == [
        Job("00000", "a red apple", seed=10), Job("7", "b", seed=2, quality="exact"), Job("00003", "c", seed=13),
    ]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), [
    ("", "no jobs in it"),
    ('{"id": "a"}', "line 1: it has no prompt"),
    ('{"prompt": "a", "sed": 1}', "line 1: .*Did you mean 'seed'"),
    ('{"prompt": "a", "id": "../a"}', "line 1: .*id must be letters"),
    ('{"prompt": "a", "id": ".a"}', "id must be letters"),
    ('{"prompt": "a", "seed": -1}', "seed must be"),
    ('{"prompt": "a", "steps": 2.5}', "steps must be"),
    ('{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}', "line 2: the id 'x' is there twice"),
    ('{"prompt": ', "line 1: no JSON: expecting value at its end"),
    ('{"prompt": "a" "id": "b"}', "line 1: no JSON: expecting ',' delimiter at '\"id\": \"b\"}', character 16"),
    ("[1,2]", r"line 1: '\[1,2\]' is JSON, but no object"),
    ("7", "line 1: '7' is JSON, but no object"),
    ('{"prompt": "a", "quality": "hihg"}', "line 1: unknown quality 'hihg'"),
    ('{"prompt": 3}', "line 1: Job: prompt must be text, got 3"),
    ('{"prompt": "a", "id": ["a"]}', "id must be text of 1 to 120 characters"),
    ('{"prompt": null}', "line 1: Job: prompt must be text, got None"),
    ('{"prompt": "a", "id": true}', "line 1: Job: id must be text of 1 to 120 characters, got True"),
    (r'{"prompt": "\ud800"}', "line 1: it holds half a character"),
])  # fmt: skip
def test_bad_jobs_are_named_by_their_line(text, message, tmp_path):
    (tmp_path / "jobs.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_jobs(tmp_path / "jobs.jsonl")


def test_a_long_id_is_not_shown_whole(tmp_path):
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "a", "id": "%s"}' % ("x" * 300))
    with pytest.raises(ConfigError, match="id must be text of 1 to 120 characters") as refused:
        read_jobs(tmp_path / "jobs.jsonl")
    assert "x" * 50 not in str(refused.value)
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "a", "%s": 1}' % ("x" * 300))
    with pytest.raises(ConfigError, match="unknown entry") as refused:
        read_jobs(tmp_path / "jobs.jsonl")
    assert "x" * 100 not in str(refused.value)


def test_prompts_that_only_look_like_json_are_prompts(tmp_path):
    (tmp_path / "jobs.txt").write_text("[close-up] red apple\n'quoted'\n")
    assert [job.prompt for job in read_jobs(tmp_path / "jobs.txt")] == ["[close-up] red apple", "'quoted'"]


@pytest.mark.parametrize(("options", "message"), [
    (("--quality", "hihg"), "unknown quality 'hihg'"),
    (("--method", "foca:intervall=3"), "Did you mean 'interval'"),
    (("--method", "foca+hicache"), "give one caching method"),
    (("--method", "leap:calibration=nowhere.safetensors"), "no such file"),
    (("--method", "fbcache", "--computed-steps", 3), "computed_steps"),
])  # fmt: skip
def test_settings_that_no_model_has_are_refused_before_one_is_loaded(options, message, monkeypatch, capsys, tmp_path):
    install(monkeypatch, subject.PIPELINES, "tiny", lambda: pytest.fail("the model was loaded"))
    (tmp_path / "jobs.txt").write_text("red apple\n")
    given = ("generate", "--model", "tiny", "--prompts-file", tmp_path / "jobs.txt", "--out", tmp_path / "out")
    code, text = command(monkeypatch, capsys, *given, *options)
    assert code == 2
    assert message in text


def test_a_byte_order_mark_is_no_part_of_a_job(tmp_path):
    (tmp_path / "jobs.jsonl").write_text('\ufeff{"id": "a1", "prompt": "red\u2028apple"}\r\n', encoding="utf-8")
    assert [(job.id, job.prompt) for job in read_jobs(tmp_path / "jobs.jsonl")] == [("a1", "red\u2028apple")]


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["hasten", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main.main()
    printed = capsys.readouterr()
    return end.value.code, " ".join((printed.out + printed.err).split())


def test_the_command_takes_a_configuration_and_goes_on(monkeypatch, capsys, tmp_path):
    install(monkeypatch, subject.PIPELINES, "tiny", tiny)
    (tmp_path / "hasten.yaml").write_text("model: tiny\nmethod: foca:schedule=even\ncomputed_steps: 4\n")
    (tmp_path / "jobs.txt").write_text("red apple\nblue car\n")
    arguments = ("generate", "--config", tmp_path / "hasten.yaml", "--prompts-file", tmp_path / "jobs.txt")
    code, text = command(monkeypatch, capsys, *arguments, "--out", tmp_path / "out")
    assert (code, "2 of 2 images" in text) == (0, True)
    code, text = command(monkeypatch, capsys, *arguments, "--out", tmp_path / "out", "--computed-steps", 3)
    assert code == 2
    assert "was made of another job" in text
    code, text = command(monkeypatch, capsys, *arguments, "--out", tmp_path / "draft", "--quality", "draft")
    assert code == 2
    assert "'draft' is not certified" in text
    code, text = command(monkeypatch, capsys, *arguments[:1], *arguments[3:], "--out", tmp_path / "none")
    assert code == 2
    assert "a model is needed" in text


SCRIPT = """
import sys
sys.path[:0] = {paths!r}
from test_generate import CALL, FOCA, worker
from hasten.integrations.batch import generate, read_jobs
from pathlib import Path
own = worker()
print("ready", flush=True)
generate(own, read_jobs(Path({jobs!r})), Path({out!r}))
"""


@pytest.mark.slow
def test_killed_twenty_times_every_image_is_there_once_and_right(tmp_path):
    jobs = tmp_path / "jobs.txt"
    jobs.write_text("".join(f"red apple {i}\n" for i in range(60)))
    generate(worker(), read_jobs(jobs), tmp_path / "right")
    out = tmp_path / "out"
    code = SCRIPT.format(paths=[p for p in sys.path if p], jobs=str(jobs), out=str(out))
    rng = random.Random(0)
    for _ in range(20):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0, 0.5))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    assert not list(out.glob(".*"))  # no temporary is left
    names = sorted(path.name for path in out.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "right").iterdir())
    for name in names:
        if name.endswith(".png"):
            assert (out / name).read_bytes() == (tmp_path / "right" / name).read_bytes()
