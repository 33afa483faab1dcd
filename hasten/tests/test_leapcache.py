"""LEAP at a cache's site: weights that were learned on the accelerated sampler's own path."""

import pytest
import torch
from pipelines import draw, make_pipe

import hasten
from hasten.caching.methods.leapcache import LearnedWeights, learned_table
from hasten.caching.schedule import computed_steps
from hasten.errors import CalibrationError, ConfigError, ScheduleError

STEPS = 12
LISTS = [(0, 3, 6, 9), (0, 2, 4, 6, 8, 10)]


def calls(*seeds):
    common = {"prompt": "red apple", "height": 32, "width": 32, "max_sequence_length": 8, "num_inference_steps": STEPS}
    return [{**common, "generator": torch.Generator().manual_seed(seed)} for seed in seeds]


@pytest.fixture(scope="module")
def learned():
    return hasten.fit_leapcache(make_pipe(), calls(0, 1, 2), LISTS)


def test_a_table_is_least_squares_on_the_newest_full_steps():
    """Features that are linear in the step are forecast exactly from two of them, at every later step."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 50, generator=generator, dtype=torch.float64)
    goal = torch.stack([a + t * b for t in range(STEPS)], 1)
    steps = (0, 3, 6, 9)
    table = learned_table(goal[:, list(steps)], goal, steps, window=2, ridge=1e-12)
    for t in (4, 5, 7, 11):
        forecast = (table[t, :, None] * goal[:, list(steps)].float()).sum(1)
        assert torch.allclose(forecast, goal[:, t], atol=1e-3)
    assert (table[11, :2] == 0).all()
    assert (table[11, 2:] != 0).all()
    assert (table[list(steps)] == 0).all()


def test_weights_follow_the_anchors_and_end_in_reuse():
    table = torch.tensor([[0.0, 0.0], [0.75, 0.0], [0.0, 0.0], [-0.5, 1.5]]).double().numpy()
    weights = LearnedWeights((0, 2), table)
    assert weights.memory == 2
    assert weights.weights(3, [2, 0]) == [1.5, -0.5]
    assert weights.weights(1, [0]) == [0.75]
    assert weights.weights(7, [2, 0]) == [1.0, 0.0]


def test_its_own_path_is_never_worse_than_recorded_features(learned):
    for count in ("4", "6"):
        errors = learned.report[count]["error_per_sweep"]
        assert learned.report[count]["relative_squared_error"] == min(errors) <= errors[0]
    assert learned.report["6"]["relative_squared_error"] < learned.report["4"]["relative_squared_error"]


def test_it_beats_reuse_at_the_same_steps_on_another_seed(learned, tmp_path):
    pipe = make_pipe()
    plain = draw(pipe, STEPS, generator=torch.Generator().manual_seed(9))

    def error(*method, **params):
        with hasten.accelerate(pipe, *method, **params) as run:
            result = draw(pipe, STEPS, generator=torch.Generator().manual_seed(9))
            return float((result - plain).norm()), [r.step for r in run.records if r.computed]

    file = learned.save(tmp_path / "leapcache.safetensors")
    own, steps = error("leapcache", calibration=file, interval=2)
    assert steps == list(LISTS[1])
    reuse, _ = error(hasten.Reuse(steps=LISTS[1], warmup=1))
    assert own < 0.5 * reuse
    assert torch.equal(draw(pipe, STEPS, generator=torch.Generator().manual_seed(9)), plain)


def test_the_interval_chooses_the_list_and_one_computes_everything(learned):
    def lists(**params):
        return computed_steps(hasten.LeapCache(calibration=learned, **params).plan(), STEPS)

    assert lists(interval=2) == list(LISTS[1])
    assert lists(interval=3, warmup=1) == list(LISTS[0])
    assert lists(interval=1) == list(range(STEPS))
    assert lists(computed_steps=4) == list(LISTS[0])
    assert lists(computed_steps=6) == list(LISTS[1])
    with pytest.raises(ScheduleError, match="computed_steps=5, but lists were learned for 4, 6"):
        lists(computed_steps=5)
    with pytest.raises(ScheduleError, match="learned for 4, 6"):
        lists(interval=12, warmup=1)


def test_what_it_does_not_take(learned):
    for name, value in (("steps", (0, 5)), ("schedule", "even"), ("searched", learned)):
        with pytest.raises(ConfigError, match=f"LeapCache: {name} must be"):
            hasten.LeapCache(calibration=learned, **{name: value})
    with pytest.raises(CalibrationError, match="nothing to learn from"):
        hasten.fit_leapcache(make_pipe(), [], LISTS)
    for wrong in ((1, 4), (0, 4, 4), (0, 12), tuple(range(STEPS))):
        with pytest.raises(ConfigError, match="increases from 0"):
            hasten.fit_leapcache(make_pipe(), calls(0), [wrong])
    other = make_pipe(5)
    with pytest.raises(CalibrationError, match="other weights"):
        hasten.accelerate(other, "leapcache", calibration=learned)
