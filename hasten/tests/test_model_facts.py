"""What a denoiser is, to the last bit: every change is found, and a model without one costs no second reading."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from hasten.quality import model_facts
from hasten.quality.model_facts import CHUNK, ModelFacts


def make(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 300), nn.BatchNorm1d(300), nn.Linear(300, 8))
    model.register_buffer("scratch", torch.zeros(3), persistent=False)
    return model.eval()


def one_number(model):
    model[0].weight[217, 5] += 1e-6


def two_rows_exchanged(model):
    model[0].weight[[3, 4]] = model[0].weight[[4, 3]]


def one_sign(model):
    model[2].bias[1] *= -1


def past_the_count(model):
    model[2].weight.data.mul_(1.001)


def another_tensor(model):
    model[0].bias = nn.Parameter(model[0].bias + 1e-3)


def what_it_counted(model):
    model[1].running_mean[7] = 0.5


CHANGES = [one_number, two_rows_exchanged, one_sign, past_the_count, another_tensor, what_it_counted]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("seen", [False, True])
def test_every_change_of_a_number_is_found(change, seen):
    model = make()
    own = ModelFacts.of(model)
    here = model if seen else copy.deepcopy(model)
    with torch.no_grad():
        change(here)
    assert own.differences(ModelFacts.of(here))[0].startswith("certified for other weights")
    assert ModelFacts.of(here) == ModelFacts.of(copy.deepcopy(here))


def test_a_model_without_a_change_is_read_once(monkeypatch):
    model = make()
    own = ModelFacts.of(model)
    monkeypatch.setattr(model_facts, "_digest", lambda *_: pytest.fail("all of it was read again"))
    model.scratch += 1  # is in no file of weights
    assert ModelFacts.of(model) == own
    assert ModelFacts.of(model.requires_grad_(False)) == own


def test_the_same_numbers_in_other_places_are_the_same_model():
    model, other = make(), make()
    other[0].weight = nn.Parameter(other[0].weight.detach().t().contiguous().t())  # as channels last
    assert not other[0].weight.is_contiguous()
    assert ModelFacts.of(other) == ModelFacts.of(model)


def test_another_dtype_class_or_shape_is_named():
    own = ModelFacts.of(make())
    assert own.differences(ModelFacts.of(make().bfloat16())) == [
        "certified for weights in float32, these are in bfloat16"
    ]
    mixed = make()
    mixed[1].half()
    assert ModelFacts.of(mixed).dtype == "float16 and float32"
    assert "is Linear" in own.differences(ModelFacts.of(nn.Linear(2, 2)))[0]
    assert "another configuration" in own.differences(ModelFacts.of(nn.Sequential(*make()[:2])))[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float8_e4m3fn, torch.complex64, torch.bool])
def test_numbers_of_all_kinds_are_read(dtype):
    def facts(place):
        module = nn.Module()
        module.register_buffer("x", torch.zeros(1001).to(dtype))
        if place is not None:
            module.x[place] = 1
        return ModelFacts.of(module)

    assert len({facts(place).weights for place in (None, 0, 1, 1000)}) == 4


def test_a_number_beyond_the_first_chunk_counts():
    module = nn.Module()
    module.register_buffer("x", torch.zeros(2 * CHUNK + 5))
    seen = {ModelFacts.of(module).weights}
    for place in (CHUNK - 1, CHUNK, 2 * CHUNK + 4):
        module.x.zero_()
        module.x[place] = 1
        seen.add(ModelFacts.of(module).weights)
    assert len(seen) == 4


def test_adapters_and_their_strength_count():
    plain, model = make(), make()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), model, "style")
    own = ModelFacts.of(model)
    assert "adapters such as LoRA" in ModelFacts.of(plain).differences(own)[0]
    model[0].set_scale("style", 0.5)
    weaker = ModelFacts.of(model)
    assert own.differences(weaker)
    model[0].enable_adapters(False)
    assert weaker.differences(ModelFacts.of(model))


def test_offloaded_weights_are_compared_where_they_can_be_read():
    own, offloaded = ModelFacts.of(make()), make()
    cpu_offload(offloaded, torch.device("cpu"))
    assert next(offloaded.parameters()).is_meta
    assert own.differences(ModelFacts.of(offloaded)) == []
    other = make(1)
    cpu_offload(other, torch.device("cpu"))
    assert "other weights" in own.differences(ModelFacts.of(other))[0]
    assert "cannot be compared" in own.differences(ModelFacts.of(make().to("meta")))[0]
