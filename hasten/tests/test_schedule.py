"""Which steps are full: the counts that the papers' FLOPs columns rest on, and what is refused."""

import pytest
from hasten.caching import Explicit, Spread, TaylorSeer, Uniform, computed_steps
from hasten.errors import ConfigError, ScheduleError, UnknownNameError
from hypothesis import assume, given
from hypothesis import strategies as st

COUNTS_E3 = {2: 26, 3: 18, 4: 14, 5: 12, 6: 10, 7: 9, 8: 8, 9: 8, 10: 7, 12: 6}
COUNTS_E2 = {3: 18, 4: 14, 5: 11, 6: 10, 7: 8, 8: 8, 9: 7}


@pytest.mark.parametrize(("interval", "count"), COUNTS_E3.items())
def test_counts_with_three_warmup_steps(interval, count):
    assert len(computed_steps(Uniform(interval, 3), 50)) == count


@pytest.mark.parametrize(("interval", "count"), COUNTS_E2.items())
def test_counts_with_two_warmup_steps(interval, count):
    assert len(computed_steps(Uniform(interval, 2), 50)) == count


def test_full_steps_are_where_the_official_rule_puts_them():
    assert computed_steps(Uniform(6, 3), 50) == [0, 1, 2, 8, 14, 20, 26, 32, 38, 44]
    assert computed_steps(Uniform(5, 1), 50) == list(range(0, 50, 5))
    assert computed_steps(Uniform(1, 3), 50) == list(range(50))


@given(st.integers(1, 30), st.integers(1, 10), st.integers(1, 80))
def test_warmup_is_full_and_no_gap_exceeds_the_interval(interval, warmup, total):
    assume(warmup <= total)
    computed = computed_steps(Uniform(interval, warmup), total)
    assert computed[: min(warmup, total)] == list(range(min(warmup, total)))
    gaps = [b - a for a, b in zip(computed[warmup - 1 :], computed[warmup:], strict=False)]
    assert all(gap == interval for gap in gaps)
    assert total - 1 - computed[-1] < interval


def test_explicit_steps_are_exactly_those():
    steps = (0, 1, 2, 4, 9, 17, 26, 35, 43)
    assert tuple(computed_steps(Explicit(steps), 50)) == steps


@pytest.mark.parametrize(
    ("count", "interval", "actual"), [(12, 5, 12), (9, 7, 9), (7, 10, 7), (11, 6, 10), (8, 8, 8), (50, 1, 50)]
)
def test_smallest_interval_with_no_more_full_steps(count, interval, actual):
    method = TaylorSeer().with_computed_steps(count, 50)
    assert method.interval == interval
    assert len(computed_steps(method.plan(), 50)) == actual


def test_fewer_full_steps_than_the_warmup_are_refused_with_the_remedy():
    with pytest.raises(ScheduleError, match="warmup=1"):
        TaylorSeer().with_computed_steps(2, 50)


@pytest.mark.parametrize("bad", [0, -3])
def test_interval_below_one_is_refused(bad):
    with pytest.raises(ConfigError, match="at least 1"):
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
    with pytest.raises(ScheduleError, match="bare transformer"):
        Uniform(5, 3, last=True).for_run(None)
    with pytest.raises(ScheduleError, match="bare transformer"):
        Spread(5, 3).for_run(None)


def test_named_schedules_spend_the_same_number_of_full_steps_elsewhere():
    lists = {}
    for name in ("uniform", "last", "even", "early"):
        method = TaylorSeer(schedule=name).with_computed_steps(9, 50)
        lists[name] = computed_steps(method.plan(), 50)
        assert len(lists[name]) <= 9
        assert lists[name][0] == 0
    assert lists["even"] == [0, 6, 12, 18, 24, 31, 37, 43, 49]
    assert lists["last"][-1] == lists["early"][-1] == 49
    assert lists["early"][4] < lists["even"][4]
    with pytest.raises(UnknownNameError, match="Did you mean 'even'"):
        TaylorSeer(schedule="evn")
