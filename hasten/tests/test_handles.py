"""The handle and those who lost it: summary, remove, replace, what a notebook shows, the default method."""

from __future__ import annotations

import pytest
import tiny
import torch
from pipelines import draw

import hasten
from hasten import registry
from hasten.caching import Uniform, computed_steps
from hasten.caching.default import DEFAULT
from hasten.errors import (
    AlreadyAcceleratedError,
    ConfigError,
    HastenError,
    ScheduleError,
    TargetError,
    UnknownNameError,
)
from hasten.pipeline.hooks import hooks_on


def staged():
    return hasten.Fresco(stages=(4, 4, 4), shares=0.3)


def test_a_lost_handle_is_found_by_its_pipeline_and_its_transformer(pipe):
    plain = draw(pipe)
    for target in (pipe, pipe.transformer):
        hasten.accelerate(pipe, "taylorseer", interval=4)
        draw(pipe)
        assert hasten.summary(target).computed_steps == 5
        hasten.remove(target)
        hasten.remove(target)  # twice is once
        assert not hooks_on(pipe.transformer)
        assert torch.equal(draw(pipe), plain)
        with pytest.raises(ConfigError, match="not accelerated"):
            hasten.summary(target)
    with pytest.raises(TargetError):
        hasten.remove(object())


def test_replace_takes_the_old_one_away_and_a_refused_one_leaves_it(pipe):
    old = hasten.accelerate(pipe, "taylorseer", interval=4)
    fast = draw(pipe)
    with pytest.raises(AlreadyAcceleratedError, match="replace=True"):
        hasten.accelerate(pipe, "reuse", interval=4)
    with pytest.raises(HastenError):
        hasten.accelerate(pipe, "magcache", replace=True)  # has no calibration
    assert torch.equal(draw(pipe), fast)
    new = hasten.accelerate(pipe, "reuse", interval=4, replace=True)
    other = draw(pipe)
    assert not torch.equal(other, fast)
    assert (len(old.records), len(new.records)) == (24, 12)
    old.remove()  # of something that is gone: the new one stays
    assert torch.equal(draw(pipe), other)
    new.remove()
    hasten.accelerate(pipe, "reuse", interval=4, replace=True).remove()  # with nothing to replace
    assert not hooks_on(pipe.transformer)


def test_replace_with_a_resolution_method_and_one_that_does_not_fit(pipe):
    size = {"height": 64, "width": 64}
    with hasten.accelerate(pipe, staged(), hasten.TaylorSeer(interval=3)) as fresh:
        both = draw(pipe, **size)
        assert fresh.summary().skipped_steps
    with hasten.accelerate(pipe, staged()):
        alone = draw(pipe, **size)
    old = hasten.accelerate(pipe, staged())
    old_hooks = hooks_on(pipe.transformer)
    for wrong, error in (
        ((pipe.transformer, staged()), TargetError),  # a bare transformer has no scheduler
        ((pipe, hasten.SpecEdit()), TargetError),  # edits take another pipeline
        ((pipe, "dvg"), TargetError),
    ):
        with pytest.raises(error):
            hasten.accelerate(*wrong, replace=True)
        assert hooks_on(pipe.transformer) == old_hooks
    assert torch.equal(draw(pipe, **size), alone)
    new = hasten.accelerate(pipe, staged(), hasten.TaylorSeer(interval=3), replace=True)
    assert torch.equal(draw(pipe, **size), both)
    assert torch.equal(draw(pipe, **size), both)
    old.remove()
    assert len(hooks_on(pipe.transformer)) == 2
    # A cache alone takes both away, and the scheduler's step with them.
    cache = hasten.accelerate(pipe, "taylorseer", interval=3, replace=True)
    assert [hook.kind for hook in hooks_on(pipe.transformer)] == ["caching"]
    assert "step" not in vars(pipe.scheduler)
    new.remove()
    cache.remove()
    assert not hooks_on(pipe.transformer)


def test_a_stale_scheduler_does_not_hinder_replacing(pipe):
    """After the scheduler was exchanged the method has to be put on again: replace=True does it in one line."""
    hasten.accelerate(pipe, staged())
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    with pytest.raises(ConfigError, match="another scheduler"):
        draw(pipe, height=64, width=64)
    with hasten.accelerate(pipe, staged(), replace=True):
        draw(pipe, height=64, width=64)


def test_replace_reaches_what_was_put_on_the_bare_transformer(pipe):
    hasten.accelerate(pipe.transformer, "taylorseer", interval=4)
    with hasten.accelerate(pipe, "reuse", interval=4, replace=True) as run:
        draw(pipe)
        assert run.summary().method == "Reuse"


def test_without_a_method_it_is_the_default(pipe):
    with hasten.accelerate(pipe, *registry.parse(DEFAULT)):
        expected = draw(pipe)
    with hasten.accelerate(pipe) as run:
        assert torch.equal(draw(pipe), expected)
        computed = [record.step for record in run.records if record.computed]
        assert computed == computed_steps(hasten.TaylorSeer(schedule="auto").plan(), run.summary().steps)
        assert run.summary().skipped_steps
    with hasten.accelerate(pipe, interval=3, sigma=0.5) as run:
        assert (run.method.order, run.method.sigma, run.method.interval) == (1, 0.5, 3)
        assert run.method.guided(3.0).sigma == 0.5  # a scale of one's own holds with guidance too
    with hasten.accelerate(pipe, steps=(0, 2, 7)) as run:
        draw(pipe)
        assert [record.step for record in run.records if record.computed] == [0, 2, 7]


def test_the_default_serves_a_bare_transformer():
    name = "FluxTransformer2DModel"
    model = tiny.build(name)
    with torch.no_grad(), hasten.accelerate(model) as run:
        tiny.sample(name, model)
        assert [record.step for record in run.records if record.computed] == computed_steps(Uniform(5), 12)
    run = hasten.accelerate(model, computed_steps=5)
    with torch.no_grad(), run, pytest.raises(ScheduleError, match="how many steps"):
        tiny.sample(name, model)


def test_a_summary_of_a_resolution_method_alone_and_with_a_cache(pipe):
    size = {"height": 64, "width": 64}
    with hasten.accelerate(pipe, staged()) as run:
        draw(pipe, **size)
        alone = run.summary()
        assert (alone.method, alone.steps, alone.computed_steps) == ("Fresco", 12, 12)
        assert alone.passes == ()
        assert alone.stages == run.stages.report().described
        assert "tokens" in alone.stages
        assert str(alone).startswith("Fresco: 12 of 12 steps computed")
        assert alone.stages in run._repr_html_()
        assert repr(run).startswith("Acceleration(Fresco(")
        assert hasten.summary(pipe) == alone
        hasten.remove(pipe)
        assert not hooks_on(pipe.transformer)
    with hasten.accelerate(pipe, "taylorseer", interval=4) as run:
        draw(pipe)
        assert run.summary().stages is None
    with hasten.accelerate(pipe, staged(), hasten.TaylorSeer(interval=3, warmup=1)) as run:
        draw(pipe, **size)
        both = run.summary()
        assert both.method == "TaylorSeer + Fresco"
        assert 0 < both.skipped_steps < 12
        assert both.stages == alone.stages
        for part in ("TaylorSeer", "forecast", both.stages):
            assert part in str(both)
        assert {"TaylorSeer(", "Fresco("} <= {repr(run)[i : i + n] for n in (7, 11) for i in range(len(repr(run)))}


def test_summaries_count_runs_from_both_ends(pipe):
    with hasten.accelerate(pipe, "taylorseer", interval=4) as run:
        draw(pipe, 8)
        draw(pipe, 12)
        assert [run.summary(i).steps for i in (0, 1, -1, -2)] == [8, 12, 12, 8]
        with pytest.raises(ConfigError, match="no run 2"):
            run.summary(2)
    assert run.summary(0).steps == 8  # records outlive the acceleration


def test_what_a_notebook_shows(pipe):
    with hasten.accelerate(pipe, "taylorseer", interval=4) as run:
        assert "call the pipeline first" in run._repr_html_()
        draw(pipe)
        shown = run.summary()._repr_html_()
        assert shown in run._repr_html_()
    for part in ("computed steps", ">5<", "flops ratio", "2.40"):
        assert part in shown
    assert "stages" not in shown
    assert run.summary().to_dict()["computed_steps"] == 5


def test_text_that_is_no_name_is_refused_with_what_reads_it(pipe, tmp_path):
    text = "hicache:order=1:interval=4"
    with hasten.accelerate(pipe, "hicache", order=1, interval=4) as run:
        fast, saved = draw(pipe), str(run.save(tmp_path / "run.yaml"))
    for given in (text, saved):
        with pytest.raises(ConfigError) as told:
            hasten.accelerate(pipe, given)
        assert not hooks_on(pipe.transformer)
        remedy = str(told.value).partition("give ")[2].partition("), or")[0].rstrip(")") + "))"
        with eval(remedy, {"accelerate": hasten.accelerate, "hasten": hasten, "pipe": pipe}):
            assert torch.equal(draw(pipe), fast)
    with pytest.raises(ConfigError, match="is an expression"):
        hasten.accelerate(pipe, "dvg+foca")
    for expression in ("foca:calibration=x.json", " foca"):
        with pytest.raises(ConfigError, match="is an expression"):
            hasten.accelerate(pipe, expression)
    with pytest.raises(ConfigError, match=r"quality='certs/high\.JSON' for a certificate"):
        hasten.accelerate(pipe, "certs/high.JSON")
    with pytest.raises(ConfigError, match="is not parameter=value"):
        hasten.accelerate(pipe, "foca:")
    for unknown in ("focca", "focca:interval=3", "foca+"):
        with pytest.raises(UnknownNameError, match="Did you mean 'foca'"):
            hasten.accelerate(pipe, unknown)


def test_names_of_the_package():
    for name in ("remove", "summary", "accelerate", "Summary", "Acceleration"):
        assert name in hasten.__all__
        assert getattr(hasten, name).__doc__
