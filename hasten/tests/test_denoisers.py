"""Every denoiser of the installed diffusers at every site: right, or refused by name, as the benchmark saw it.

A few of different build are checked always, all of them with the slow tests.
"""

import json
from pathlib import Path

import diffusers
import pytest
from denoisers import checks

ROOT = Path(__file__).resolve().parents[2]
SEEN = json.loads((ROOT / "benchmarks" / "denoisers.json").read_text(encoding="utf-8"))["denoisers"]
FEW = [
    "LTX2VideoTransformer3DModel",  # two streams, by its entry
    "PriorTransformer",  # by the probe; its result has another name
    "LatteTransformer3DModel",  # two lists in turn, tokens turned around between the blocks
    "Cosmos3OmniTransformer",  # lists of latents, several timesteps
    "UNet2DConditionModel",
    "StableCascadeUNet",  # levels that are lists
]


def cells():
    """Denoiser and site; slow unless it is one of the few."""
    for name in checks.DENOISERS:
        for site in checks.SITES:
            yield pytest.param(name, site, marks=() if name in FEW else pytest.mark.slow)


def test_no_denoiser_of_the_installed_diffusers_is_untested():
    untested = checks.shipped() - set(checks.DENOISERS)
    assert not untested, f"untested: write tiny configurations for {', '.join(sorted(untested))} in tests/denoisers"
    assert set(SEEN) == set(checks.DENOISERS), "run benchmarks/denoisers.py"


@pytest.mark.parametrize(
    ("module", "forward"),
    [
        ("models.transformers.transformer_new", lambda self, hidden_states, timestep: None),
        ("models.unets.unet_new", lambda self, sample, time: None),
        ("models.new", lambda self, x, t: None),
        ("pipelines.new.modeling", lambda self, x, sigmas: None),
    ],
)
def test_a_denoiser_of_a_newer_diffusers_is_untested(monkeypatch, module, forward):
    new = type("New", (diffusers.ModelMixin,), {"forward": forward, "__module__": f"diffusers.{module}"})
    monkeypatch.setattr(diffusers, "NewDenoiser", new, raising=False)
    assert checks.shipped() - set(checks.DENOISERS) == {"NewDenoiser"}


@pytest.mark.parametrize(("name", "site"), cells())
def test_a_denoiser_at_a_site(name, site):
    verdict = checks.subject(name).check(site)
    assert verdict.status == SEEN[name]["cells"][site]["status"], verdict.detail
    assert verdict.status in ("right", "refused")
    assert verdict.status == "right" or name in verdict.detail  # a refusal names what it refuses


def right(kind, *sites):
    """How many denoisers of a kind are right at one of the sites."""
    rows = [row["cells"] for row in SEEN.values() if row["kind"] == kind]
    return sum(any(cells[site]["status"] == "right" for site in sites) for cells in rows), len(rows)


def test_nearly_all_of_them_are_right():
    assert right("transformer", "hidden")[0] >= 68
    assert right("transformer", "hidden", "output")[0] >= 70
    found, total = right("unet", "output")
    assert found >= 9
    assert found / total >= 0.9


@pytest.mark.parametrize("method", ["fbcache", "teacache"])
@pytest.mark.parametrize("name", checks.TRANSFORMERS)
def test_a_gate_between_the_blocks_sees_the_image(name, method):
    """Nothing that stays as it is from step to step, such as the text, is what it goes by."""
    assert checks.subject(name).gate(method) in ("computes", "refused")
