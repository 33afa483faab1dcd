"""The certificates that come with the small models are for these models, and are found."""

from __future__ import annotations

from types import SimpleNamespace

import hasten
import pytest
from hasten.errors import CertificateError
from hasten.pipeline.view import denoisers
from hasten.quality.certificate import Certificate
from hasten.quality.conditions import scheduler_facts
from hasten.quality.tolerance import TIERS

from hasten_zoo.emoji_flux import certificates, load_emoji_flux


@pytest.fixture(scope="module")
def emoji():
    return load_emoji_flux()


@pytest.mark.parametrize("quality", sorted(path.stem for path in certificates().glob("*.json")))
def test_what_comes_is_certified_for_the_model_as_it_is(quality, emoji):
    made = Certificate.load(certificates() / f"{quality}.json")
    assert (made.quality, made.tolerance) == (quality, TIERS[quality])
    assert made.conditions.pipeline_differences(emoji.pipe) == []
    assert made.conditions.model_differences(denoisers(emoji.pipe)) == []
    assert made.conditions.scheduler_differences(emoji.pipe.scheduler) == []
    assert scheduler_facts(emoji.pipe.scheduler)[0] == made.conditions.scheduler
    assert made.evidence.requests >= 100
    assert made.evidence.bound["share"] >= made.tolerance.share


def test_a_quality_works_as_it_is(emoji, tmp_path, monkeypatch):
    monkeypatch.setenv("HASTEN_CERTIFICATES", str(tmp_path))
    entry = SimpleNamespace(load=lambda: certificates)
    monkeypatch.setattr("hasten.quality.certificate.entry_points", lambda group: [entry])
    with hasten.accelerate(emoji.pipe, quality="high") as run:
        emoji.pipe(emoji.prompts[0], **emoji.call, output_type="pt")
        assert run.summary().computed_steps == Certificate.load(certificates() / "high.json").computed_steps < 50
        with pytest.raises(CertificateError, match=r"certified for 50 steps, this call has 30.*--steps 30"):
            emoji.pipe(emoji.prompts[0], **emoji.call | {"num_inference_steps": 30})
