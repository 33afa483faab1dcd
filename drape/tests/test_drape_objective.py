"""The objective over a sequence (CL-3 to CL-5), metrics, and defences that merge detections."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from drape.defences import aggregate, consensus, union
from drape.detectors.base import Candidates, Detection, box_iou, non_maximum_suppression
from drape.errors import ConfigError, UnknownNameError
from drape.evaluate import recovered
from drape.gamut import Gamut
from drape.metrics import (
    average_precision,
    azimuth_curve,
    confidences,
    frame_success,
    group_means,
    longest_run,
    sequence_success,
    track_recall,
    transfer_matrix,
)
from drape.objective import (
    WEIGHTINGS,
    Temporal,
    confidence,
    frame_weights,
    naturalness,
    sequence_loss,
    spread,
    temporal_loss,
    walks_loss,
)
from drape.texture import ControlPointTexture, TextureSpec
from drape.transforms import Transforms, drift, photometric

BOX = torch.tensor([10.0, 10, 20, 40])
NONE = Detection(torch.zeros(0, 4), torch.zeros(0))


def seen(score: float, shift: float = 0.0) -> Detection:
    return Detection((BOX + shift)[None], torch.tensor([score]))


@pytest.mark.parametrize("mode", WEIGHTINGS)
@pytest.mark.parametrize("progress", [0.0, 0.4, 1.0])
def test_frame_weights_sum_to_one(mode: str, progress: float, generator: torch.Generator) -> None:
    """CL-3."""
    weights = frame_weights(Temporal(mode=mode, window=5), torch.rand(17, generator=generator), progress=progress)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-5)
    assert float(weights.min()) >= 0


@pytest.mark.parametrize("window", [1, 4, 12])
def test_windowed_loss_is_at_least_the_mean(window: int, generator: torch.Generator) -> None:
    """CL-4; windows are circular, so the mean of their means is the mean of the frames."""
    values = torch.rand(12, generator=generator)
    loss = float(temporal_loss(Temporal(mode="window", window=window), values))
    assert loss >= float(values.mean()) - 1e-6
    if window == 12:
        assert loss == pytest.approx(float(values.mean()), abs=1e-5)
    else:
        assert loss > float(values.mean()) + 1e-3


def test_windowed_weights_are_the_gradient_of_the_windowed_loss(generator: torch.Generator) -> None:
    temporal = Temporal(mode="window", window=4)
    values = torch.rand(11, generator=generator).requires_grad_()
    (gradient,) = torch.autograd.grad(temporal_loss(temporal, values), values)
    torch.testing.assert_close(gradient, frame_weights(temporal, values))


def test_hard_and_windowed_weights_prefer_the_frames_that_are_seen() -> None:
    d = torch.tensor([0.1, 0.1, 0.9, 0.9, 0.1, 0.1])
    for mode in ("hard", "window"):
        weights = frame_weights(Temporal(mode=mode, window=2), d)
        assert set(weights.topk(2).indices.tolist()) == {2, 3}
    torch.testing.assert_close(frame_weights(Temporal(mode="uniform"), d), torch.full((6,), 1 / 6))


def test_a_run_counts_only_where_a_whole_window_is_seen() -> None:
    """Six frames that are seen in a row, and the same number scattered: the mean is the same, the run is not."""
    together = torch.tensor([0.9] * 6 + [0.1] * 6)
    scattered = torch.tensor([0.9, 0.1] * 6)
    for mode, gap in (("uniform", 0.0), ("run", 0.3)):
        temporal = Temporal(mode=mode, window=4, kappa=20)
        losses = [float(temporal_loss(temporal, d)) for d in (together, scattered)]
        assert losses[0] - losses[1] == pytest.approx(gap, abs=1e-6) or losses[0] - losses[1] > gap > 0
    values = scattered.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(temporal_loss(temporal, values), values)
    torch.testing.assert_close(gradient, frame_weights(temporal, values))


def test_curriculum_goes_from_one_frame_to_all() -> None:
    temporal = Temporal(mode="curriculum")
    assert [temporal.window_at(p, 9) for p in (0.0, 0.5, 1.0)] == [1, 5, 9]


def test_variance_counts() -> None:
    calm, wild = torch.full((8,), 0.5), torch.tensor([0.1, 0.9] * 4)
    temporal = Temporal(mode="uniform", variance=0.0)
    with_variance = Temporal(mode="uniform", variance=0.5)
    assert float(sequence_loss(with_variance, calm)) == pytest.approx(float(sequence_loss(temporal, calm)))
    added = float(sequence_loss(with_variance, wild) - sequence_loss(temporal, wild))
    assert added == pytest.approx(0.5 * 0.16, abs=1e-5)


def test_drift_has_the_autocorrelation_of_its_coefficient(generator: torch.Generator) -> None:
    """CL-5."""
    x = drift(400, 400, 0.95, generator)
    assert float(x.var()) == pytest.approx(1, abs=0.06)
    for lag in (1, 5, 10):
        assert float((x[lag:] * x[:-lag]).mean()) == pytest.approx(0.95**lag, abs=0.06)


def test_photometric_changes_drift_slowly_and_stay_in_range(generator: torch.Generator) -> None:
    frames = torch.full((40, 3, 4, 4), 0.5)
    means = photometric(frames, Transforms(noise=0.0), generator).mean(dim=(1, 2, 3))
    assert float((means - 0.5).abs().max()) <= 0.1
    assert float(means.diff().abs().mean()) < 0.5 * float(means.std())
    whole = photometric(frames, Transforms(noise=0.0), states=torch.linspace(-1, 1, 80).view(40, 2))
    part = photometric(frames[5:7], Transforms(noise=0.0), states=torch.linspace(-1, 1, 80).view(40, 2)[5:7])
    assert torch.equal(whole[5:7], part)
    with pytest.raises(ConfigError, match="states"):
        photometric(frames, Transforms(), states=torch.zeros(3, 2))


def test_confidence_counts_boxes_on_the_person_only() -> None:
    boxes = torch.stack([BOX, BOX + 5, BOX + 100])[None]
    scores = torch.tensor([[0.3, 0.6, 0.9]], requires_grad=True)
    found = Candidates(boxes, scores)
    assert float(confidence(found, BOX[None], "max").detach()) == pytest.approx(0.6)
    assert float(confidence(found, BOX[None], "best").detach()) == pytest.approx(0.3)
    assert 0.6 <= float(confidence(found, BOX[None], "smooth").detach()) < 0.65
    (gradient,) = torch.autograd.grad(confidence(found, BOX[None]).sum(), scores)
    assert gradient.tolist() == [[0, 1, 0]]
    assert float(confidence(Candidates(boxes[:, 2:], scores[:, 2:]), BOX[None]).detach()) == 0
    with pytest.raises(UnknownNameError, match="best"):
        confidence(found, BOX[None], "bst")


@torch.no_grad()
def test_spread_is_larger_for_points_on_a_heap_and_naturalness_for_another_pattern() -> None:
    spec, palette = TextureSpec(height=40, width=40, colours=2, points=4), torch.tensor([[0.2] * 3, [0.6] * 3])
    corners = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])
    apart = ControlPointTexture(spec, palette, Gamut.proxy(), corners.expand(2, 4, 2))
    heap = ControlPointTexture(spec, palette, Gamut.proxy(), torch.full((2, 4, 2), 0.5))
    assert float(spread(apart)) == pytest.approx(0, abs=1e-4)
    assert float(spread(heap)) == pytest.approx(1 - 1 / 4, abs=1e-4)
    sides = torch.cat([torch.full((4, 1, 2), 0.2), torch.full((4, 1, 2), 0.8)], dim=1).transpose(0, 1).squeeze(2)
    halves = ControlPointTexture(spec, palette, Gamut.proxy(), sides.reshape(2, 4, 2))
    labels = halves.choice(hard=True).argmax(dim=0)
    assert float(naturalness(halves, labels)) < float(naturalness(halves, 1 - labels))
    with pytest.raises(ConfigError, match="label map"):
        naturalness(halves, labels[:3])


@pytest.mark.parametrize(
    "make",
    [
        lambda: Temporal(mode="windw"),
        lambda: Temporal(window=0),
        lambda: Transforms(coefficient=1.0),
        lambda: Transforms(contrast=-1),
        lambda: Transforms(zoom=(0.5, -0.5)),
        lambda: Transforms(places=1.5),
        lambda: Temporal(mining=-0.1),
        lambda: drift(0, 1, 0.5),
        lambda: temporal_loss(Temporal(), torch.zeros(0)),
        lambda: Temporal().window_at(1.5, 4),
        lambda: confidence(Candidates(torch.zeros(1, 1, 4), torch.zeros(1, 1)), torch.zeros(2, 4)),
    ],
)
def test_bad_objectives_are_refused(make: object) -> None:
    with pytest.raises(ConfigError, match=r"expected|Known"):
        make()  # type: ignore[operator]


def test_overlap_and_suppression() -> None:
    boxes = torch.stack([BOX, BOX + 1, BOX + 50])
    assert float(box_iou(boxes[:1], boxes[1:2])) == pytest.approx(9 * 29 / (2 * 300 - 9 * 29))
    assert non_maximum_suppression(boxes, torch.tensor([0.5, 0.8, 0.1])).tolist() == [1, 2]


def test_average_precision_by_hand() -> None:
    truth = BOX.expand(3, 4)
    assert average_precision([seen(0.9)] * 3, truth) == pytest.approx(1)
    assert average_precision([NONE] * 3, truth) == 0
    # true .9, false .8, true .7, one missed: precisions 1 and 2/3 at recalls 1/3 and 2/3
    assert average_precision([seen(0.9), seen(0.8, 100), seen(0.7)], truth) == pytest.approx(1 / 3 + 2 / 9)
    double = Detection(torch.stack([BOX, BOX]), torch.tensor([0.9, 0.8]))
    assert average_precision([double, NONE, NONE], truth) == pytest.approx(1 / 3)


def test_success_and_runs() -> None:
    d = np.array([0.9, 0.8, 0.1, 0.7, 0.7, 0.7, 0.2])
    assert frame_success(d) == pytest.approx(2 / 7)
    assert longest_run(d) == 3
    assert longest_run(np.zeros(4)) == 0
    assert sequence_success([d, np.zeros(7)], share=0.1) == 0.5
    assert confidences([seen(0.9), seen(0.9, 100), NONE], BOX.expand(3, 4)).tolist() == pytest.approx([0.9, 0, 0])
    with pytest.raises(ConfigError, match="confidences"):
        longest_run(np.array([np.nan]))
    with pytest.raises(ConfigError, match="frames"):
        average_precision([NONE], BOX.expand(3, 4))


def test_track_bridges_as_long_as_its_memory() -> None:
    truth = BOX.expand(8, 4)
    walk = [seen(0.9), *[NONE] * 7]
    assert track_recall(walk, truth, memory=5) == pytest.approx(6 / 8)
    assert track_recall(walk, truth, memory=0) == pytest.approx(1 / 8)
    assert track_recall([NONE, *walk[:7]], truth, memory=5) == pytest.approx(6 / 8)


def test_curves_groups_and_transfer() -> None:
    angles, means = azimuth_curve(np.array([0.0, 2, 180]), np.array([0.2, 0.4, 0.9]))
    assert len(angles) == 37
    assert means[0] == means[-1] == pytest.approx(0.3)
    assert means[18] == pytest.approx(0.9)
    assert np.isnan(means[9])
    assert group_means(["sun", "dusk", "sun"], [np.ones(2), np.zeros(3), np.zeros(2)]) == {"sun": 0.5, "dusk": 0.0}
    rows, columns, values = transfer_matrix({"a": {"a": 1.0, "b": 0.5}, "b": {"b": 0.9, "a": 0.4}})
    assert (rows, columns, values.tolist()) == (["a", "b"], ["a", "b"], [[1.0, 0.5], [0.4, 0.9]])
    with pytest.raises(ConfigError, match="same columns"):
        transfer_matrix({"a": {"a": 1.0}, "b": {"b": 1.0}})


def test_aggregation_bridges_gaps_from_what_has_passed() -> None:
    truth = BOX.expand(5, 4)
    gap = [seen(0.9), NONE, NONE, NONE, seen(0.8)]
    assert confidences(aggregate(gap, reach=1), truth).tolist() == pytest.approx([0.9, 0.9, 0, 0, 0.8])
    assert confidences(aggregate(gap, reach=3), truth).tolist() == pytest.approx([0.9, 0.9, 0.9, 0.9, 0.8])
    whole, cut = aggregate(gap, reach=2), aggregate(gap[:3], reach=2)
    for early, late in zip(cut, whole, strict=False):
        assert torch.equal(early.boxes, late.boxes)  # frames to come change nothing


def test_aggregation_moves_boxes_on_and_gives_them_up_where_the_person_is_found() -> None:
    walking = [seen(0.9, 8.0 * t) for t in range(3)]
    bridged = aggregate([*walking, NONE], reach=1)
    assert bridged[3].boxes.tolist() == [(BOX + 24).tolist()]
    assert [len(found.scores) for found in aggregate(walking, reach=2)] == [1, 1, 1]
    unsure = aggregate([seen(0.9), seen(0.3, 100)], reach=1)
    assert sorted(unsure[1].scores.tolist()) == pytest.approx([0.3, 0.9])


def test_aggregation_costs_false_boxes() -> None:
    truth = BOX.expand(5, 4)
    stray = Detection(torch.stack([BOX, BOX + 100]), torch.tensor([0.7, 0.85]))
    false = [seen(0.7), seen(0.7), stray, seen(0.7), seen(0.7)]
    assert average_precision(aggregate(false, reach=1), truth) < average_precision(false, truth)
    assert [len(d.scores) for d in aggregate(false, reach=1)] == [1, 1, 2, 2, 1]


def test_consensus_takes_as_many_as_it_says() -> None:
    views = [[seen(0.9), seen(0.9)], [seen(0.6, 0.5), NONE], [seen(0.4), seen(0.7, 100)]]
    two, three = consensus(views), consensus(views, least=3)
    assert [d.scores.tolist() for d in two] == [[pytest.approx(0.6)], []]
    assert three[0].scores.tolist() == [pytest.approx(0.4)]
    anyone = union(views)
    assert [sorted(d.scores.tolist()) for d in anyone] == [[pytest.approx(0.9)], pytest.approx([0.7, 0.9])]
    for join in (consensus, union):
        with pytest.raises(ConfigError, match="same"):
            join([[NONE], [NONE, NONE]])
    with pytest.raises(ConfigError, match="least=4"):
        consensus(views, least=4)


def test_recovered_share() -> None:
    assert recovered(1.0, 0.2, 0.6) == pytest.approx(0.5)
    assert recovered(0.5, 0.5, 0.6) is None


def test_loss_of_walks_is_their_mean_or_leans_to_those_that_are_seen() -> None:
    walks = [torch.linspace(0.1, 0.9, 6), torch.linspace(0.5, 0.2, 4)]
    for mode in WEIGHTINGS:
        temporal = Temporal(mode=mode, window=2)
        each = [float(sequence_loss(temporal, d, d, 0.5)) for d in walks]
        even, mined = (walks_loss(replace(temporal, mining=m), walks, walks, 0.5) for m in (0.0, 0.6))
        assert float(even) == pytest.approx(np.mean(each), abs=1e-6)
        assert float(even) < float(mined) < max(each)  # more weight for the one that is seen more
    with pytest.raises(ConfigError, match="running"):
        walks_loss(Temporal(), walks, [])
