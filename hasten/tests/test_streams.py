"""A clip and its sound: every method forecasts both, or is refused by name."""

import pytest
import tiny
import torch
from denoisers import checks
from matrix import THRESHOLDS, caching_methods

import hasten
from hasten import registry
from hasten.errors import AdapterError

AUDIO_VISUAL = ["LTX2VideoTransformer3DModel", "Kandinsky6Transformer3DModel"]
STEPS = 8


class Both:
    """A tiny transformer of clips with sound, and a loop in which the clip moves."""

    def __init__(self, name):
        self.tiny = checks.DENOISERS[name]
        self.model = tiny.build(name, self.tiny)
        self.plain = self.sample()

    @torch.no_grad()
    def sample(self):
        """Both outputs of the last step."""
        x = tiny.randn(*self.tiny.latent, seed=1)
        for i in range(STEPS):
            clip, sound = checks.tensors(self.model(**self.tiny.arguments(x, 1 - i / STEPS)))
            x = x - 0.03 * clip / clip.std() * x.std()
        return clip, sound


@pytest.fixture(scope="module", params=AUDIO_VISUAL)
def both(request):
    return Both(request.param)


@pytest.fixture(scope="module")
def trace(both):
    return hasten.record(both.model, [both.sample])


@pytest.mark.parametrize("method", caching_methods())
def test_every_method_forecasts_clip_and_sound(both, trace, method):
    params = {"threshold": THRESHOLDS[method]} if method in THRESHOLDS else {"interval": 2}
    if next(info for info in registry.methods() if info.name == method).needs_calibration:
        params["calibration"] = hasten.fit(trace, method)
    if method == "magcache":
        params["retention"] = 0.0
    if method == "freqca":
        with hasten.accelerate(both.model, method, **params), pytest.raises(AdapterError, match="stream of its own"):
            both.sample()
        return
    if method == "teacache" and type(both.model).__name__.startswith("Kandinsky6"):
        with hasten.accelerate(both.model, method, **params), pytest.raises(AdapterError, match="not described for"):
            both.sample()
        return
    with hasten.accelerate(both.model, method, **params) as run:
        outputs = both.sample()
        assert run.summary().skipped_steps > 0
        assert all(map(torch.equal, both.sample(), outputs))
    for found, plain in zip(outputs, both.plain, strict=True):
        assert 0 < (found - plain).norm() / plain.norm() < 0.6
    assert all(map(torch.equal, both.sample(), both.plain))


def test_the_transformer_without_a_prompt_is_accelerated_too():
    """Ideogram 4 has two: one of them sees the prompt, the other one does not."""
    name = "Ideogram4Transformer2DModel"

    class Pipe:
        transformer = tiny.build(name, checks.DENOISERS[name])
        unconditional_transformer = tiny.build(name, checks.DENOISERS[name])

    with hasten.accelerate(Pipe(), "reuse", interval=2, warmup=1) as run:
        assert list(run.engines) == ["transformer", "unconditional_transformer"]
        with torch.no_grad():
            for model in (Pipe.transformer, Pipe.unconditional_transformer):
                for i in range(4):
                    x = tiny.randn(*checks.DENOISERS[name].latent)
                    model(**checks.DENOISERS[name].arguments(x, 1 - i / 4))
        for engine in run.engines.values():
            assert [record.computed for record in engine.records] == [True, False, True, False]
