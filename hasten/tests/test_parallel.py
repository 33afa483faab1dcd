"""Context parallelism: two processes that share the tokens of one image decide and answer as one process does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from diffusers import ContextParallelConfig
from tiny import TINY, build, first
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import hasten
from hasten.caching import Uniform, computed_steps
from hasten.caching.methods.hicache import AdaptiveHermite
from hasten.pipeline import context_parallel
from hasten.pipeline.context_parallel import group, sum_over

WORLD = 2
STEPS = 8
TEXT = 6  # diffusers shards the text as well, and only into equal parts
FAMILIES = ["FluxTransformer2DModel", "QwenImageTransformer2DModel"]
CASES = [(family, method, site) for family in FAMILIES for method, site in [("hicache", "hidden"), ("foca", "output")]]
CASES += [("FluxTransformer2DModel", "taylorseer", "module"), ("QwenImageTransformer2DModel", "reuse", "module")]


def arguments(family: str, x: Tensor, t: float) -> dict[str, Any]:
    """Those of `tiny`, with an even number of text tokens."""
    given = TINY[family].arguments(x, t)
    given["encoder_hidden_states"] = torch.randn(1, TEXT, 32, generator=torch.Generator().manual_seed(7))
    if "txt_ids" in given:
        given["txt_ids"] = torch.zeros(TEXT, 3)
    given.pop("encoder_hidden_states_mask", None)
    return {**given, "return_dict": False}  # as pipelines do; diffusers shards no other form


@torch.no_grad()
def sample(family: str, model: Any) -> Tensor:
    x = torch.randn(*TINY[family].latent, generator=torch.Generator().manual_seed(1))
    for i in range(STEPS):
        velocity = first(model(**arguments(family, x, 1 - i / STEPS)))
        x = x - 0.03 * velocity.repeat(1, 1, x.shape[-1] // velocity.shape[-1])
    return x


def accelerated(case: tuple[str, str, str], model: Any) -> tuple[Tensor, list[bool], int]:
    """Final latent, decisions, and bytes that this process holds."""
    family, method, site = case
    with hasten.accelerate(model, method, interval=3, site=site) as run:
        result = sample(family, model)
        return result, [record.computed for record in run.records], run.summary().cache_bytes


def _start(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)


def share_tokens(model: Any) -> None:
    """Switch context parallelism on. diffusers numbers a device by the count of accelerators, which may be 0."""
    mesh = dist.init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("ring", "ulysses"))
    with mock.patch("torch.accelerator.device_count", return_value=1):
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=WORLD, mesh=mesh))


def _one_of_two(rank: int, folder: str, before: bool) -> None:
    """One of two processes: what it gets of every case, with parallelism switched on before or after hasten."""
    _start(rank, WORLD, folder)
    results = []
    for case in CASES:
        model = build(case[0])
        if before:
            share_tokens(model)
            results.append((*accelerated(case, model), sample(case[0], model)))
            continue
        run = hasten.accelerate(model, case[1], interval=3, site=case[2])
        share_tokens(model)
        result = sample(case[0], model)
        decisions, held = [record.computed for record in run.records], run.summary().cache_bytes
        run.remove()
        results.append((result, decisions, held, sample(case[0], model)))
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False], ids=["parallel-first", "hasten-first"])
def test_two_devices_decide_and_answer_as_one(tmp_path, before):
    torch.multiprocessing.spawn(_one_of_two, (str(tmp_path), before), nprocs=WORLD)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    for i, case in enumerate(CASES):
        model = build(case[0])
        plain = sample(case[0], model)
        alone, decisions, held = accelerated(case, model)
        assert decisions == [step in computed_steps(Uniform(3, 3), STEPS) for step in range(STEPS)]
        for result, their_decisions, their_held, after in (ranks[rank][i] for rank in range(WORLD)):
            assert their_decisions == decisions, case
            assert torch.allclose(result, alone, atol=1e-5), case
            assert torch.allclose(after, plain, atol=1e-5), case  # removal leaves the parallel model right
            shares = case[2] != "output"  # the output is gathered on every device
            assert their_held == (held // WORLD if shares else held), case
        assert torch.equal(ranks[0][i][0], ranks[1][i][0]), case
        assert not torch.allclose(alone, plain, atol=1e-5), case  # else nothing would have been shown


SHARDED = [("hicache", {}), ("taylorseer", {"site": "module"}), ("fbcache", {}), ("teacache", {}), ("speca", {})]


def test_a_fully_sharded_transformer_decides_and_answers_as_a_plain_one(tmp_path):
    """Its blocks bring their weights in hooks of their own, which nothing may pass by."""
    family, model = FAMILIES[0], build(FAMILIES[0])
    expected = []
    for method, params in SHARDED:
        with hasten.accelerate(model, method, interval=3, **params) as run:
            expected.append((sample(family, model), [record.computed for record in run.records]))
    _start(0, 1, str(tmp_path))
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        for block in (*model.transformer_blocks, *model.single_transformer_blocks, model):
            fully_shard(block, mesh=mesh)
        for (method, params), (latents, decisions) in zip(SHARDED, expected, strict=True):
            with hasten.accelerate(model, method, interval=3, **params) as run:
                assert torch.allclose(sample(family, model), latents, atol=1e-5), method
                assert [record.computed for record in run.records] == decisions
    finally:
        dist.destroy_process_group()


def test_what_devices_measure_of_equal_tokens_is_what_one_measures(monkeypatch):
    """Methods that fit themselves to features are told means over all devices, whatever the number of these."""
    told: list[Tensor] = []
    fitted = AdaptiveHermite.fitted

    def watched(self: AdaptiveHermite, target: int, stored: Any, gram: Any) -> list[float]:
        told.append(torch.as_tensor(gram).clone())
        return fitted(self, target, stored, gram)

    monkeypatch.setattr(AdaptiveHermite, "fitted", watched)
    results, grams = [], []
    for devices in (1, 2):
        if devices == 2:
            monkeypatch.setattr(context_parallel, "group", lambda model: SimpleNamespace(size=lambda: 2))
            monkeypatch.setattr(context_parallel, "sum_over", lambda model, tensor: 2 * tensor)
        model = build("FluxTransformer2DModel")
        with hasten.accelerate(model, "hicache", scale="adaptive", interval=3):
            results.append(sample("FluxTransformer2DModel", model))
        grams.append(told.copy())
        told.clear()
    assert torch.equal(*results)
    assert len(grams[0]) > 0
    for one, two in zip(*grams, strict=True):
        assert torch.allclose(one, two)


def _sum_in_pairs(rank: int, folder: str) -> None:
    """Four processes, two images: each pair sums its own."""
    _start(rank, 4, folder)
    mesh = dist.init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("data", "ring", "ulysses"))
    config = SimpleNamespace(_flattened_mesh=mesh["ring", "ulysses"]._flatten())
    model = nn.Identity()
    model._parallel_config = SimpleNamespace(context_parallel_config=config, tensor_parallel_config=None)
    mine = torch.tensor([10.0**rank, 1.0])
    total = sum_over(model, mine)
    torch.save((mine, total, dist.get_world_size(group(model))), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_sum_stays_among_the_devices_of_one_image(tmp_path):
    torch.multiprocessing.spawn(_sum_in_pairs, (str(tmp_path),), nprocs=4)
    for rank in range(4):
        mine, total, size = torch.load(tmp_path / f"{rank}.pt")
        assert mine.tolist() == [10.0**rank, 1.0]  # the argument is left alone
        assert total.tolist() == [11.0 if rank < 2 else 1100.0, 2.0]
        assert size == 2


@pytest.mark.parametrize("config", [None, SimpleNamespace(context_parallel_config=None, tensor_parallel_config=1)])
def test_without_context_parallelism_nothing_is_summed(config):
    model = nn.Linear(1, 1)
    model._parallel_config = config
    tensor = torch.ones(2)
    assert group(model) is None
    assert sum_over(model, tensor) is tensor
    assert group(nn.Linear(1, 1)) is None


def test_a_process_group_alone_is_no_context_parallelism(tmp_path):
    """Data parallelism: the devices work on images of their own."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = build("FluxTransformer2DModel")
        assert group(model) is None
        mesh = dist.init_device_mesh("cpu", (1, 1), mesh_dim_names=("ring", "ulysses"))
        shared = SimpleNamespace(_flattened_mesh=mesh["ring", "ulysses"]._flatten())
        model._parallel_config = SimpleNamespace(context_parallel_config=shared)
        assert dist.get_world_size(group(model)) == 1
        tensor = torch.ones(2)
        total = sum_over(model, tensor)
        assert total is not tensor
        assert torch.equal(total, tensor)
    finally:
        dist.destroy_process_group()
