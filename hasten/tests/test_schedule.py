"""Which steps are computed: the counts that the papers' FLOPs columns rest on, and what is refused."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pipelines import draw

import hasten
from hasten.caching import Explicit, Spread, Uniform, UniformCount, computed_steps
from hasten.caching.methods import TaylorSeer
from hasten.caching.schedule import learned_list, told_steps
from hasten.calibration import RunFacts
from hasten.errors import ConfigError, ScheduleError

COUNTS_E3 = {2: 26, 3: 18, 4: 14, 5: 12, 6: 10, 7: 9, 8: 8, 9: 8, 10: 7, 12: 6}
COUNTS_E2 = {3: 18, 4: 14, 5: 11, 6: 10, 7: 8, 8: 8, 9: 7}


@pytest.mark.parametrize(("interval", "count"), COUNTS_E3.items())
def test_counts_with_three_warmup_steps(interval, count):
    assert len(computed_steps(Uniform(interval, 3), 50)) == count


@pytest.mark.parametrize(("interval", "count"), COUNTS_E2.items())
def test_counts_with_two_warmup_steps(interval, count):
    assert len(computed_steps(Uniform(interval, 2), 50)) == count


def test_computed_steps_are_where_the_official_rule_puts_them():
    assert computed_steps(Uniform(6, 3), 50) == [0, 1, 2, 8, 14, 20, 26, 32, 38, 44]
    assert computed_steps(Uniform(5, 1), 50) == list(range(0, 50, 5))
    assert computed_steps(Uniform(1, 3), 50) == list(range(50))


@given(st.integers(1, 30), st.integers(1, 10), st.integers(1, 80))
def test_warmup_is_computed_and_no_gap_exceeds_the_interval(interval, warmup, total):
    assume(warmup <= total)
    computed = computed_steps(Uniform(interval, warmup), total)
    assert computed[: min(warmup, total)] == list(range(min(warmup, total)))
    gaps = [b - a for a, b in zip(computed[warmup - 1 :], computed[warmup:], strict=False)]
    assert all(gap == interval for gap in gaps)
    assert total - 1 - computed[-1] < interval


def test_explicit_steps_are_exactly_those():
    steps = (0, 1, 2, 4, 9, 17, 26, 35, 43)
    assert tuple(computed_steps(Explicit(steps), 50)) == steps


# --- a number of computed steps


@given(st.integers(1, 40), st.integers(1, 10), st.integers(1, 60), st.booleans())
def test_a_uniform_schedule_by_count_is_exact_or_names_the_counts_there_are(count, warmup, total, last):
    """The oracle lays out the schedule of every interval."""
    assume(warmup + last <= count)
    assume(warmup <= total)
    intervals = {}
    for interval in range(1, total + 1):
        intervals.setdefault(len(computed_steps(Uniform(interval, warmup, last), total)), interval)
    asked = UniformCount(count, warmup, last)
    if count in intervals:
        smallest = Uniform(intervals[count], warmup, last)
        assert computed_steps(asked, total) == computed_steps(smallest, total)
        assert len(computed_steps(asked, total)) == count
        return
    with pytest.raises(ScheduleError) as error:
        computed_steps(asked, total)
    assert f"take one of {', '.join(map(str, sorted(intervals)))}, another warmup" in str(error.value)


@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from(["even", "early", "auto"]))
def test_spread_schedules_have_any_number(count, total, name):
    method = TaylorSeer(schedule=name, computed_steps=count)
    if count > total:
        with pytest.raises(
            ScheduleError, match=f"computed_steps={count} is more than the {told_steps(total)} of the run"
        ):
            computed_steps(method.plan(), total)
    else:
        assert len(computed_steps(method.plan(), total)) == count


def test_the_longest_learned_list_that_fits_is_taken():
    lists = [(0, 5), (0, 3, 9), (0, 1, 2, 7), (0, 1, 2, 5, 8)]
    assert learned_list(lists, Uniform(3, 1), 10) == (0, 1, 2, 7)  # which computes 0, 3, 6, 9
    assert learned_list(lists, Uniform(4, 1), 10) == (0, 3, 9)
    assert learned_list(lists, 5, 10) == (0, 1, 2, 5, 8)
    assert learned_list(lists[1:], Uniform(9, 1), 9, exact=False) == (0, 3, 9)
    with pytest.raises(ScheduleError, match="asks for 1 computed steps, but lists were learned for 3, 4, 5"):
        learned_list(lists[1:], Uniform(9, 1), 9)


@pytest.mark.parametrize(("count", "interval"), [(12, 5), (9, 7), (7, 10), (10, 6), (8, 8), (50, 1)])
def test_a_count_is_the_smallest_interval_that_has_it(count, interval):
    plan = TaylorSeer(computed_steps=count).plan()
    assert computed_steps(plan, 50) == computed_steps(TaylorSeer(interval=interval).plan(), 50)


@pytest.mark.parametrize(
    ("count", "total", "listed"),
    [
        (12, 50, [0, 3, 6, 10, 14, 19, 23, 28, 33, 38, 43, 48]),
        (9, 50, [0, 4, 9, 14, 20, 27, 33, 40, 47]),
        (7, 50, [0, 5, 12, 20, 28, 37, 46]),
        (10, 28, [0, 2, 4, 7, 10, 13, 16, 19, 23, 26]),
        (10, 20, [0, 1, 3, 5, 7, 9, 12, 14, 16, 19]),  # gaps of two: the last step is one of them
        (2, 50, [0, 30]),
        (1, 50, [0]),
    ],
)
def test_the_computed_steps_of_auto(count, total, listed):
    assert computed_steps(TaylorSeer(schedule="auto", computed_steps=count).plan(), total) == listed


@given(st.integers(2, 60), st.integers(2, 100))
def test_auto_is_denser_early_and_leaves_less_than_half_a_gap_behind_it(count, total):
    if count > total:
        return
    steps = computed_steps(TaylorSeer(schedule="auto", computed_steps=count).plan(), total)
    even = computed_steps(TaylorSeer(schedule="even", computed_steps=count).plan(), total)
    gap = (total - 1) / (count - 1)
    assert 0 <= total - 1 - steps[-1] < gap / 2
    assert all(a <= b for a, b in zip(steps, even, strict=True))
    if gap >= 2.5 and count > 2:
        assert steps[-1] < total - 1
        assert steps[1] - steps[0] < steps[-1] - steps[-2]


def test_auto_is_uniform_where_the_number_of_steps_is_not_known():
    auto, uniform = (TaylorSeer(schedule=name, interval=7) for name in ("auto", "uniform"))
    assert auto.for_run(RunFacts(50)) is auto
    assert auto.for_run(RunFacts()) == uniform
    with pytest.raises(ScheduleError, match="has to know how many steps"):
        TaylorSeer(schedule="auto", computed_steps=9).plan().for_run(None)


@pytest.mark.parametrize("schedule", ["uniform", "last", "even", "early"])
def test_with_computed_steps_is_exact_or_refuses(schedule):
    for count in range(1, 51):
        method = TaylorSeer(schedule=schedule)
        try:
            exact = method.with_computed_steps(count, 50)
        except ConfigError:  # the message is another test's
            assert schedule in ("uniform", "last")
        else:
            assert len(computed_steps(exact.plan(), 50)) == count


def test_the_audits_impossible_counts_are_refused_and_not_measured_as_others():
    with pytest.raises(
        ScheduleError, match="cannot compute 10 of 28 steps; take one of 3, 4, 5, 6, 7, 8, 9, 11, 15, 28"
    ):
        TaylorSeer().with_computed_steps(10, 28)
    with pytest.raises(ScheduleError, match=r"cannot compute 9 of 20 steps; take one of .*schedule='even'"):
        TaylorSeer().with_computed_steps(9, 20)
    assert len(computed_steps(TaylorSeer(schedule="even").with_computed_steps(10, 28).plan(), 28)) == 10


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"computed_steps": 9, "interval": 5}, "computed_steps and interval .* leave out computed_steps or interval"),
        ({"computed_steps": 9, "steps": (0, 4)}, "steps and computed_steps"),
        ({"steps": (0, 4), "interval": 3}, "steps and interval"),
        ({"steps": (0, 4), "schedule": "even"}, "steps and schedule"),
        ({"computed_steps": 9, "schedule": "even", "warmup": 2}, "computed_steps and warmup"),
        ({"computed_steps": 2}, "computed_steps=2 is less than warmup=3; use a shorter warmup, or schedule='even'"),
        ({"computed_steps": 3, "schedule": "last"}, "computed_steps=3 is less than warmup=3 and the last step"),
    ],
)
def test_what_says_two_things_about_the_computed_steps_is_refused_by_name(params, message):
    with pytest.raises(ConfigError, match=message):
        TaylorSeer(**params)


@pytest.mark.parametrize("count", [9, 30])
def test_an_impossible_count_is_refused_before_any_forward(pipe, count):
    forwards = []
    pipe.transformer.x_embedder.register_forward_hook(lambda *_: forwards.append(1))
    with (
        hasten.accelerate(pipe, "foca", computed_steps=count),
        pytest.raises(ScheduleError, match=f"compute {count} of 20"),
    ):
        draw(pipe, 20)
    assert not forwards


@pytest.mark.parametrize(("schedule", "count"), [("even", 9), ("early", 6), ("uniform", 8), ("last", 7)])
def test_a_run_computes_as_many_steps_as_were_asked_for(pipe, schedule, count):
    with hasten.accelerate(pipe, "foca", schedule=schedule, computed_steps=count) as run:
        draw(pipe, 18)
    assert run.summary().computed_steps == count
    assert run.summary().steps == 18


def test_a_bare_transformer_cannot_count(pipe):
    with pytest.raises(ScheduleError, match="computed_steps=9 has to know how many steps a run has"):
        UniformCount(9).for_run(None)


# --- what is refused


@pytest.mark.parametrize("bad", [0, -3])
def test_interval_below_one_is_refused(bad):
    with pytest.raises(ConfigError, match="interval must be a whole number of 1 or more"):
        Uniform(bad)


@pytest.mark.parametrize("steps", [(), (1, 2), (0, 2, 2), (0, 5, 3)])
def test_explicit_steps_must_begin_with_zero_and_increase(steps):
    with pytest.raises(ConfigError):
        Explicit(steps)


def test_schedules_that_do_not_fit_the_run_are_refused():
    with pytest.raises(ScheduleError, match="longer than the run of 2"):
        Uniform(5, 3).for_run(2)
    with pytest.raises(ScheduleError, match="outside the run of 10"):
        Explicit((0, 10)).for_run(10)


def test_last_adds_the_last_step_and_needs_its_number():
    assert computed_steps(Uniform(7, 3, last=True), 50) == [0, 1, 2, 9, 16, 23, 30, 37, 44, 49]
    assert computed_steps(Uniform(5, 1, last=True), 11) == [0, 5, 10]
    with pytest.raises(ScheduleError, match="has to know how many steps"):
        Uniform(5, 3, last=True).for_run(None)
    with pytest.raises(ScheduleError, match="has to know how many steps"):
        Spread(Uniform(5, 3)).for_run(None)


def test_named_schedules_spend_the_same_number_of_computed_steps_elsewhere():
    lists = {}
    for name in ("uniform", "last", "even", "early"):
        method = TaylorSeer(schedule=name, warmup=3).with_computed_steps(9, 50)
        lists[name] = computed_steps(method.plan(), 50)
        assert len(lists[name]) == 9
        assert lists[name][0] == 0
    assert lists["even"] == [0, 6, 12, 18, 24, 31, 37, 43, 49]
    assert lists["last"][-1] == lists["early"][-1] == 49
    assert lists["early"][4] < lists["even"][4]
    with pytest.raises(ConfigError, match="did you mean 'even'"):
        TaylorSeer(schedule="evn")
