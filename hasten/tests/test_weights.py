"""The text that tells one model's weights from another's."""

import copy

import pytest
import torch
from diffusers import WanTransformer3DModel
from leap_pipelines import stable_diffusion
from pipelines import make_pipe
from torch import nn

from hasten.weights import same_weights, spaced_digest, weights_digest


def wan() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 3, "text_dim": 16}
    return WanTransformer3DModel(**sizes, in_channels=4, out_channels=4, freq_dim=16, rope_max_seq_len=32)


MODELS = {
    "flux": lambda: make_pipe().transformer,
    "wan": wan,
    "unet": lambda: stable_diffusion("DDIMScheduler")().unet,
}


def kind(name: str) -> str:
    return ".".join("#" if part.isdigit() else part for part in name.split("."))


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_change_of_any_kind_of_matrix_is_a_change_of_weights(make):
    """As by a LoRA that was fused into one kind of layer: biases and norms stay, and all other matrices."""
    model = make()
    digest = weights_digest(model)
    kinds = {kind(name) for name, parameter in model.named_parameters() if parameter.ndim > 1}
    assert len(kinds) > 8
    assert same_weights(digest, copy.deepcopy(model))
    assert len(digest) < 2200
    missed = set()
    for chosen in kinds:
        other = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if kind(name) == chosen:
                    parameter += 0.03 * parameter.norm() / parameter.numel() ** 0.5 * torch.randn_like(parameter)
        if same_weights(digest, other):
            missed.add(chosen)
    assert len(missed) <= max(0, len(kinds) - 64), missed  # no more matrices are looked at than that


def test_all_matrices_are_seen_where_most_parameters_are_biases():
    """A stride over sorted names that is even meets biases alone: as 16 of the 1,160 parameters of FLUX.1 did."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))

    model = nn.Sequential(*(Block() for _ in range(32)))
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.2)
    assert same_weights(spaced_digest(model), other)  # what was wrong
    assert not same_weights(weights_digest(model), other)


def test_texts_of_before_0_2_are_still_read():
    model = make_pipe().transformer
    text = spaced_digest(model)
    assert text.startswith("wide:")
    assert same_weights(text, model)
    assert not same_weights(text, make_pipe(5).transformer)


def test_one_matrix_alone_is_told_however_large_the_others_are():
    model = nn.Sequential(nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16)))
    with torch.no_grad():
        model[0].weight *= 1e4
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[1][0].weight *= 1.02
    assert not same_weights(weights_digest(model), other)
    assert same_weights(weights_digest(model), copy.deepcopy(model).half())


@pytest.mark.parametrize("text", ["matrices:", "matrices:00", "matrices:zz", "matrices:" + "c07f" * 512, "all:0000"])
def test_a_text_of_nothing_known_is_no_model(text):
    assert not same_weights(text, make_pipe().transformer)
