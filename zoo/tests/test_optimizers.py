"""Muon beside AdamW, checkpoints between them, and activations that are written otherwise."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from hasten.errors import ModelError
from torch import Tensor, nn

from hasten_zoo.optimizers import MuonAdamW
from hasten_zoo.swift import swift_activations
from hasten_zoo.training import CHECKPOINT, Loss, Settings, Training, read_checkpoint, run


class Net(nn.Module):
    """A table, a stack of two layers that share their first matrix, and an end."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU("tanh"), nn.Linear(16, 8)) for _ in "ab")
        self.blocks[1][0].weight = self.blocks[0][0].weight
        self.blocks.append(nn.Embedding(3, 8))
        self.frozen = nn.ModuleList([nn.Linear(8, 8).requires_grad_(False)])
        self.end = nn.Linear(8, 5)

    def forward(self, words: Tensor) -> Tensor:
        x = self.table(words) + self.blocks[2](words % 3)
        for block in self.blocks[:2]:
            x = x + block(x)
        return self.end(self.frozen[0](x))


def _training(muon: bool, lr: float = 0.02) -> Training:
    torch.manual_seed(0)
    net = Net()

    def loss(generator: torch.Generator) -> Loss:
        words = torch.randint(5, (16,), generator=generator)
        return Loss(nn.functional.cross_entropy(net(words), (words * 2 + 1) % 5), 16, "all")

    return Training(net, loss, Settings(lr=lr, warmup_steps=10, muon=muon))


def _names(net: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[str]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return (name for name, p in net.named_parameters() if id(p) in held)


def test_matrices_of_blocks_are_muons_and_everything_else_is_adamws() -> None:
    net = Net()
    parts = MuonAdamW(net, 0.1, (0.9, 0.98), 0.01).parts
    assert set(_names(net, parts["muon"])) == {"blocks.0.0.weight", "blocks.0.2.weight", "blocks.1.2.weight"}
    rest = {"table.weight", "blocks.2.weight", "end.weight", "end.bias"}
    assert set(_names(net, parts["adamw"])) == rest | {f"blocks.{i}.{j}.bias" for i in (0, 1) for j in (0, 2)}


@pytest.mark.parametrize("muon", [True, False])
def test_it_learns_at_the_rate_it_is_given(muon: bool) -> None:
    still, moved = _training(muon, lr=0.0), _training(muon)
    before = {name: value.clone() for name, value in still.net.state_dict().items()}
    still.step()
    assert all(torch.equal(before[name], value) for name, value in still.net.state_dict().items())
    losses = [float(moved.step().value.detach()) for _ in range(80)]
    assert losses[-1] < 0.05 < 1 < losses[0]
    learned = {name for name, value in moved.net.state_dict().items() if not torch.equal(before[name], value)}
    assert learned == {name for name in before if not name.startswith("frozen")}


def test_a_run_with_muon_that_was_cut_is_the_run_that_was_not(tmp_path: Path) -> None:
    whole, first, second = _training(True), _training(True), _training(True)
    run(whole, tmp_path / "whole", samples=320)
    run(first, tmp_path / "parts", samples=96)
    run(second, tmp_path / "parts", samples=320)
    for name, value in whole.net.state_dict().items():
        assert torch.equal(value, second.net.state_dict()[name])


@pytest.mark.parametrize("muon", [True, False])
def test_a_checkpoint_of_the_other_optimizer_gives_weights_and_a_warm_up(muon: bool, tmp_path: Path) -> None:
    run(_training(not muon), tmp_path, samples=320)
    kept = read_checkpoint(tmp_path)
    training = _training(muon)
    training.restore(kept)
    assert (training.steps, training.samples, training.warm_from) == (20, 320, 20)
    assert training.learning_rate == pytest.approx(0.002)
    assert all(torch.equal(kept["net"][name], value) for name, value in training.net.state_dict().items())
    assert all(torch.equal(kept["average"][name], value) for name, value in training.average.items())
    assert float(training.step().value.detach()) < 1


@pytest.mark.parametrize("muon", [True, False])
def test_a_batch_that_is_not_finite_moves_nothing_but_the_momentum(muon: bool, tmp_path: Path) -> None:
    training = _training(muon)
    finite, bad = training.loss, [7]

    def loss(generator: torch.Generator) -> Loss:
        found = finite(generator)
        return Loss(found.value * float("nan"), 16, "all") if training.steps in bad else found

    training.loss = loss
    run(training, tmp_path, samples=160, log_every=10)
    assert all(bool(value.isfinite().all()) for value in training.net.state_dict().values())
    assert all(bool(value.isfinite().all()) for value in training.average.values())
    row = json.loads((tmp_path / "log.jsonl").read_text())
    assert row["not_finite"] == 1
    assert 0 < row["loss/all"] < 3
    before = (tmp_path / CHECKPOINT).read_bytes()
    bad.extend(range(10, 30))
    with pytest.raises(ModelError, match=r"10 of the last 10 batches .* smaller --lr"):
        run(training, tmp_path, samples=480, log_every=10, checkpoint_minutes=0)
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_a_sort_of_batch_that_was_never_finite_has_no_loss_in_the_curve(tmp_path: Path) -> None:
    training = _training(True)
    finite = training.loss

    def loss(generator: torch.Generator) -> Loss:
        found = finite(generator)
        return Loss(found.value * float("nan"), 16, "large") if training.steps == 3 else found

    training.loss = loss
    run(training, tmp_path, samples=160, log_every=10)
    row = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=pytest.fail)
    assert row["not_finite"] == 1
    assert "loss/all" in row
    assert "loss/large" not in row


def test_a_checkpoint_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no checkpoint in .*; run the training script"):
        read_checkpoint(tmp_path)
    run(_training(True), tmp_path, samples=32)
    content = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match=r"checkpoint\.pt is damaged .*; remove it"):
        run(_training(True), tmp_path, samples=64)


def test_without_muon_in_torch_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ModelError, match=r"torch 2\.9"):
        _training(True)
    _training(False)


def test_swift_activations_are_the_same_function() -> None:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "num_single_layers": 1}
    net = FluxTransformer2DModel(
        patch_size=1,
        in_channels=8,
        joint_attention_dim=12,
        pooled_projection_dim=6,
        guidance_embeds=False,
        axes_dims_rope=(4, 6, 6),
        **sizes,
    )
    call = {
        "hidden_states": torch.randn(2, 4, 8),
        "encoder_hidden_states": torch.randn(2, 3, 12),
        "pooled_projections": torch.randn(2, 6),
        "timestep": torch.rand(2),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
    }
    kernels = []

    def count(module: nn.Module, inputs: object) -> None:
        kernels.append(module)

    plain = net(**call).sample
    gradient = torch.autograd.grad(plain.square().sum(), net.single_transformer_blocks[0].proj_mlp.weight)[0]
    for module in net.modules():
        if isinstance(module, nn.GELU):
            module.register_forward_pre_hook(count)
    swift_activations(net)
    swift = net(**call).sample
    assert not kernels  # none is left that would be called
    torch.testing.assert_close(swift, plain, atol=1e-5, rtol=1e-5)
    again = torch.autograd.grad(swift.square().sum(), net.single_transformer_blocks[0].proj_mlp.weight)[0]
    torch.testing.assert_close(again, gradient, atol=1e-4, rtol=1e-4)
