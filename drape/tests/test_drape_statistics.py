"""Intervals: they hold the truth as often as they say, and see a paired difference that unpaired ones do not."""

from __future__ import annotations

import numpy as np
import pytest

from drape.errors import ConfigError
from drape.metrics import recall_area
from drape.statistics import Interval, interval, paired, within


def test_intervals_hold_the_mean_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(60):
        walks, seeds = rng.normal(0, 0.2, (1, 40)), rng.normal(0, 0.05, (6, 1))
        found = interval(0.4 + walks + seeds + rng.normal(0, 0.05, (6, 40)), seed=trial)
        inside += found.low <= 0.4 <= found.high
    assert inside >= 52


def test_more_walks_make_a_narrower_interval() -> None:
    rng = np.random.default_rng(1)
    few, many = (interval(rng.normal(0.5, 0.2, (1, count))) for count in (12, 200))
    assert many.high - many.low < 0.5 * (few.high - few.low)


def test_a_paired_difference_is_seen_where_walks_differ_more_than_textures() -> None:
    rng = np.random.default_rng(2)
    walks = rng.uniform(0, 1, (1, 40))
    first = walks + rng.normal(0, 0.02, (6, 40))
    second = first + 0.05 + rng.normal(0, 0.02, (6, 40))
    assert not interval(first).apart(interval(second))
    gain = paired(second, first)
    assert gain.low > 0.03
    assert gain.mean == pytest.approx(0.05, abs=0.01)
    assert paired(second, first) == gain
    assert paired(second, walks).low > 0  # a control has one seed


def test_intervals_within_walks_leave_out_what_all_groups_share() -> None:
    rng = np.random.default_rng(4)
    walks = rng.uniform(0, 1, (1, 40))
    groups = {name: walks + shift + rng.normal(0, 0.02, (3, 40)) for name, shift in {"a": 0.0, "b": 0.05}.items()}
    inner = within(groups)
    plain = {name: interval(values) for name, values in groups.items()}
    assert not plain["a"].apart(plain["b"])
    assert inner["a"].apart(inner["b"])
    for name in groups:
        assert inner[name].mean == pytest.approx(plain[name].mean)
        assert inner[name].high - inner[name].low < 0.2 * (plain[name].high - plain[name].low)
    with pytest.raises(ConfigError, match="same walks"):
        within({"a": groups["a"], "b": groups["b"][:, :5]})


def test_intervals_that_have_nothing_in_common_are_apart() -> None:
    assert Interval(0.5, 0.4, 0.6).apart(Interval(0.8, 0.7, 0.9))
    assert not Interval(0.5, 0.4, 0.7).apart(Interval(0.8, 0.7, 0.9))


@pytest.mark.parametrize(
    "values", [[], [[]], [[0.1, float("nan")]], [0.1, 0.2]], ids=["nothing", "no walks", "nan", "no seeds"]
)
def test_values_that_are_no_table_are_refused(values: object) -> None:
    with pytest.raises(ConfigError, match="expected"):
        interval(values)  # type: ignore[arg-type]


def test_tables_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="same walks"):
        paired(np.zeros((2, 4)), np.zeros((2, 5)))
    with pytest.raises(ConfigError, match="same seeds or one"):
        paired(np.zeros((2, 4)), np.zeros((3, 4)))


def test_area_is_the_integral_of_recall_over_the_threshold() -> None:
    d = np.random.default_rng(3).uniform(0, 1, 40)
    thresholds = np.linspace(0, 1, 20001)
    recalls = (d[None] >= thresholds[:, None]).mean(axis=1)
    assert recall_area(d) == pytest.approx(np.trapezoid(recalls, thresholds), abs=1e-3)
    with pytest.raises(ConfigError, match="confidences"):
        recall_area(np.zeros(0))
