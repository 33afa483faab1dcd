"""Training, sampling, plots and the commands at tiny size."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from hasten.bench.token_plots import plot_curves, plot_images, plot_sizes, plot_swatches, plot_tree
from hasten.cli.options import load_decoder
from hasten.cli.tokens import app
from hasten.errors import ConfigError, HastenError, ModelError
from hasten.fitting.refiner import train_refiner
from hasten.fitting.token_model import Trainer
from hasten.fitting.token_recipe import Conditions, Recipe, class_conditions
from hasten.tokens import SemanticTree, TokenMap, flat_map, random_map
from hasten.tokens.reading import read_codebook
from hasten.tokens.refiner import Refiner, RefinerConfig
from hasten.tokens.sample import Sampling, filtered, sample_clusters, scaled_top_k
from hasten.tokens.shards import TokenShards, write_shards

CODES = np.random.default_rng(0).standard_normal((24, 4))
TREE = SemanticTree.fit(CODES, normalize="none")
MAP = TREE.map(8)
SMALL = Recipe(steps=40, batch=8, lr=5e-3, warmup=5, width=16, layers=1, heads=2)


@pytest.fixture
def shards(tmp_path):
    """Class c is a run of tokens that starts at 5 c: easy to learn."""
    classes = np.arange(32) % 4
    return write_shards(tmp_path / "fine", (5 * classes[:, None] + np.arange(6)) % 24, 24, classes)


def test_training_learns_the_classes_and_samples_them(shards, tmp_path):
    trainer = Trainer(shards, MAP, SMALL, cpu=True)
    before = trainer.evaluate(shards)
    assert trainer.run(tmp_path / "run", shards, every=20)
    after = trainer.evaluate(shards)
    assert before["entropy_over_log_k"] == pytest.approx(1, abs=0.05)
    assert before["loss"] == pytest.approx(math.log(8), abs=0.3)
    inside = np.log(MAP.sizes[MAP(shards.take(range(32)))]).mean()
    assert before["token_loss"] == pytest.approx(before["loss"] + inside, rel=1e-5)
    assert after["loss"] < 0.5 * before["loss"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [20, 40]
    classes = torch.arange(4).repeat(8)
    condition, none = trainer.conditions.of(classes), trainer.conditions.none()
    guided = Sampling(temperature=0.3, guidance=1.5)
    clusters, states = sample_clusters(trainer.causal, condition, 6, guided, without=none)
    expected = MAP((5 * classes[:, None].numpy() + np.arange(6)) % 24)
    assert (clusters.numpy() == expected).mean() > 0.7
    assert states.shape == (32, 6, 16)
    again, _ = sample_clusters(trainer.causal, condition, 6, guided, without=none)
    assert torch.equal(clusters, again)


def test_a_run_that_was_cut_off_ends_as_one_that_was_not(shards, tmp_path):
    whole = Trainer(shards, MAP, SMALL, cpu=True)
    whole.run(tmp_path / "whole", every=20)
    first = Trainer(shards, MAP, SMALL, cpu=True)
    assert not first.run(tmp_path / "parts", minutes=0.0, every=20)
    assert first.steps == 1  # time is looked at after each step
    second = Trainer(shards, MAP, SMALL, cpu=True)
    assert second.run(tmp_path / "parts", every=20)
    for a, b in zip(whole.causal.parameters(), second.causal.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_checkpoint_of_another_run_is_refused(shards, tmp_path):
    trainer = Trainer(shards, MAP, SMALL, cpu=True)
    trainer.save(tmp_path / "checkpoint.safetensors")
    with pytest.raises(ModelError, match="another recipe or map"):
        Trainer(shards, TREE.map(9), SMALL, cpu=True).run(tmp_path)
    with pytest.raises(ConfigError, match="vocabulary of 24"):
        Trainer(shards, flat_map(25), SMALL, cpu=True)


def test_a_refiner_is_trained_on_a_model_that_stays_as_it_is(shards):
    trainer = Trainer(shards, MAP, SMALL, cpu=True)
    model, conditions = trainer.causal, trainer.conditions
    before = [p.clone() for p in model.parameters()]
    torch.manual_seed(0)
    refiner = Refiner(MAP, RefinerConfig(hidden=16, width=16, heads=2))
    losses = train_refiner(model, refiner, shards, conditions, steps=80, batch=16, lr=5e-3)
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(ConfigError, match="the map has 25 tokens, the shards a vocabulary of 24"):
        train_refiner(model, Refiner(flat_map(25), refiner.config), shards, conditions, steps=1)
    with pytest.raises(ConfigError, match="steps must be"):
        train_refiner(model, refiner, shards, conditions, steps=0)


def test_a_refiner_of_another_map_of_as_many_clusters_is_refused(shards):
    """It was trained on clusters that the model never saw."""
    model = Trainer(shards, MAP, SMALL, cpu=True)
    other = Refiner(random_map(MAP, 1), RefinerConfig(hidden=16, width=16, heads=2))
    with pytest.raises(ConfigError, match="another map than the refiner's"):
        train_refiner(model.causal, other, shards, model.conditions, steps=1)


def test_a_refiner_takes_states_of_half_precision_and_refuses_what_it_does_not_know():
    refiner = Refiner(MAP, RefinerConfig(hidden=16, width=16, heads=2)).eval()
    states, clusters = torch.randn(2, 3, 16).bfloat16(), torch.zeros(2, 3, dtype=torch.long)
    expected = refiner(states.float(), clusters)
    assert torch.equal(refiner(states, clusters), expected)
    assert refiner.bfloat16().sample(states.float(), clusters).shape == (2, 3)
    for wrong in (clusters - 1, clusters + MAP.clusters):
        with pytest.raises(ConfigError, match="are not all in 0"):
            refiner.sample(states, wrong)
    for wrong in (clusters - 1, clusters + MAP.tokens):
        with pytest.raises(ConfigError, match="are not all in 0"):
            refiner.loss(states, wrong)


def test_held_out_images_are_of_the_kind_that_is_trained_on(shards, tmp_path):
    """Others were measured all the same: of another vocabulary, with texts for classes, without labels as class 0."""
    trainer = Trainer(shards, MAP, SMALL, cpu=True)
    tokens = np.zeros((3, shards.length), int)
    others = {
        "vocabulary of 10": write_shards(tmp_path / "a", tokens, 10, [0, 1, 2]),
        "has texts": write_shards(tmp_path / "b", tokens, MAP.tokens, [[1, 2]] * 3),
        "has no labels": write_shards(tmp_path / "c", tokens, MAP.tokens),
        "knows the classes": write_shards(tmp_path / "d", tokens, MAP.tokens, [trainer.classes] * 3),
        "holds no image": write_shards(tmp_path / "e", tokens[:0], MAP.tokens, []),
    }
    for message, other in others.items():
        with pytest.raises(ConfigError, match=message):
            trainer.evaluate(other)
    for message in ("has texts", "vocabulary of 10"):
        with pytest.raises(ConfigError, match=message):
            trainer.run(tmp_path / "run", others[message])
    for wrong in ({"minutes": "3"}, {"minutes": float("nan")}, {"every": 0}, {"minutes": -1}):
        with pytest.raises(ConfigError, match="must be"):
            trainer.run(tmp_path / "run", **wrong)
    assert trainer.steps == 0
    assert not (tmp_path / "run").exists()


def test_classes_are_counted_from_none_on():
    for labels in ([-1, 0], [0, 4]):
        with pytest.raises(ConfigError, match=r"knows the classes 0 \.\. 3"):
            class_conditions(10, 4).of(torch.tensor(labels))
    with pytest.raises(ConfigError, match=r"are \[P\]"):
        Conditions(0, torch.tensor([[1]]))


def test_a_refiner_is_read_back_and_refuses_another_map(tmp_path):
    torch.manual_seed(0)
    refiner = Refiner(MAP, RefinerConfig(hidden=16, width=16, heads=2)).eval()
    again = Refiner.load(refiner.save(tmp_path / "refiner.safetensors"))
    hidden, clusters = torch.randn(2, 6, 16), torch.randint(8, (2, 6))
    torch.testing.assert_close(again(hidden, clusters), refiner(hidden, clusters))
    again.check(MAP)
    with pytest.raises(ModelError, match="another map"):
        again.check(TREE.map(9))
    with pytest.raises(ModelError, match="another kind of thing: 'token map'"):
        Refiner.load(MAP.save(tmp_path / "map.safetensors"))


def test_the_log_holds_what_is_measured_besides_and_the_processor_time_of_the_steps(shards, tmp_path):
    trainer = Trainer(shards, MAP, SMALL, cpu=True)
    trainer.run(tmp_path, every=20, measure=lambda t: {"half": t.steps / 2})
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["half"] for row in rows] == [10, 20]
    assert 0 < rows[0]["cpu_seconds"] < rows[1]["cpu_seconds"]
    again = Trainer(shards, MAP, SMALL, cpu=True)
    again.restore(tmp_path / "checkpoint.safetensors")
    assert again.cpu_seconds == trainer.cpu_seconds


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"lr": 0.0}, {"heads": 3}, {"condition_dropout": 1.0}, {"accumulate": 0}, {"warmup": -1}]
)
def test_recipes_that_cannot_work_are_refused(wrong):
    with pytest.raises(ConfigError):
        Recipe(**wrong)


def test_limits_keep_the_likeliest_and_scale_with_the_vocabulary():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    chances = logits.softmax(-1)
    torch.testing.assert_close(filtered(logits, Sampling()), chances)
    two = filtered(logits, Sampling(top_k=2))
    torch.testing.assert_close(two, torch.cat([chances[:, :2] / chances[:, :2].sum(), torch.zeros(1, 2)], 1))
    assert (filtered(logits, Sampling(top_p=0.8)) > 0).tolist() == [[True, True, False, False]]
    assert (filtered(logits, Sampling(top_p=0.01)) > 0).tolist() == [[True, False, False, False]]
    assert (scaled_top_k(2000, 16384, 8192), scaled_top_k(0, 9, 3), scaled_top_k(1, 100, 10)) == (1000, 0, 1)
    for wrong in ({"temperature": 0.0}, {"top_k": -1}, {"top_p": 0.0}, {"guidance": -1.0}):
        with pytest.raises(ConfigError):
            Sampling(**wrong)


def test_classes_that_the_model_does_not_know_are_refused(shards):
    trainer = Trainer(shards, MAP, SMALL, cpu=True)
    with pytest.raises(ConfigError, match=r"knows the classes 0 \.\. 3, got 5 \.\. 5"):
        sample_clusters(trainer.causal, trainer.conditions.of(torch.tensor([5])), 6)


def test_images_are_drawn(tmp_path):
    def decode(tokens):
        return np.broadcast_to((tokens / 24)[:, None, None, None], (len(tokens), 4, 4, 3)).astype(np.float32)

    def curve(*values):
        return [{"step": 10 * i, "x": x} for i, x in enumerate(values)]

    files = [
        plot_tree(TREE, tmp_path / "tree.png", top=10),
        plot_sizes({"masc": MAP}, tmp_path / "sizes.png"),
        plot_swatches(MAP, decode, tmp_path / "swatches.png", clusters=4),
        plot_curves({"flat": [curve(3, 2), curve(4, 2)], "masc": [curve(2, 1)]}, {"x": "X"}, tmp_path / "curves.png"),
    ]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    for wrong in (
        lambda: plot_tree(TREE, tmp_path / "x.png", top=1),
        lambda: plot_tree(SemanticTree.fit(CODES, exact=False, normalize="none"), tmp_path / "x.png"),
        lambda: plot_sizes({}, tmp_path / "x.png"),
        lambda: plot_images({"none": np.empty((0, 4, 4, 3), np.float32)}, tmp_path / "x.png"),
        lambda: plot_swatches(MAP, decode, tmp_path / "x.png", members=0),
        lambda: plot_curves({"flat": []}, {"x": "X"}, tmp_path / "x.png"),
        lambda: plot_curves({"flat": [curve(3, 2), curve(1)]}, {"x": "X"}, tmp_path / "x.png"),
    ):
        with pytest.raises(ConfigError):
            wrong()


def gray(tokens):
    """A decoder for `--decoder`: the number of a token as its brightness."""
    return np.broadcast_to((tokens / 24)[:, None, None, None], (len(tokens), 4, 4, 3)).astype(np.float32)


def rows_of_gray(tokens):
    """A decoder of whole images: the mean of their tokens."""
    return gray(tokens.mean(axis=1))


def run(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def test_the_commands_go_from_a_codebook_to_samples(shards, tmp_path):
    book, tree, mapping, out = (tmp_path / n for n in ("codes.npy", "tree.safetensors", "map.safetensors", "run"))
    np.save(book, CODES)
    run("fit", book, "--out", tree, "--tokens", shards.folder)
    run("inspect", tree, "--k", "8,4", "--plots", tmp_path / "plots", "--decoder", f"{__name__}:gray")
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {"sizes", "tree", "swatches-8", "swatches-4"}
    run("map", tree, "--k", 8, "--out", mapping, "--tokens", shards.folder, "--mapped", tmp_path / "coarse")
    coarse = TokenShards.open(tmp_path / "coarse")
    np.testing.assert_array_equal(coarse.take([0, 5]), TokenMap.load(mapping)(shards.take([0, 5])))
    small = ("--steps", 10, "--batch", 8, "--width", 16, "--layers", 1, "--heads", 2)
    run("train", shards.folder, "--map", mapping, "--out", out, *small)
    run("sample", out / "model", "--classes", "0,3", "--length", 6, "--out", tmp_path / "s.npy", "--guidance", 2)
    drawn = np.load(tmp_path / "s.npy")
    assert drawn.shape == (2, 6)
    assert TokenMap.load(mapping)(drawn).max() < 8
    sizes = ("--steps", 2, "--batch", 4, "--width", 8, "--heads", 2)
    run("refine", shards.folder, "--model", out / "model", "--out", tmp_path / "refiner", *sizes)
    foreign = write_shards(tmp_path / "foreign", shards.take(range(8)), 24, codebook=np.eye(24))
    with pytest.raises(ModelError, match="use the map of this tokenizer"):
        run("refine", foreign.folder, "--model", out / "model", "--out", tmp_path / "refiner", *sizes)
    drawing = ("--classes", "0,3", "--length", 6, "--out", tmp_path / "r.npy", "--guidance", 2)
    run("sample", out / "model", *drawing, "--refiner", tmp_path / "refiner")
    refined = np.load(tmp_path / "r.npy")
    np.testing.assert_array_equal(TokenMap.load(mapping)(refined), TokenMap.load(mapping)(drawn))
    run("sample", out / "model", *drawing, "--decoder", f"{__name__}:rows_of_gray")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_the_commands_refuse_what_they_cannot_read(tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        read_codebook(tmp_path / "none.npy")
    (tmp_path / "bad.npy").write_bytes(b"no array")
    with pytest.raises(ModelError, match="cannot be read"):
        read_codebook(tmp_path / "bad.npy")
    TREE.save(tmp_path / "tree.safetensors")
    with pytest.raises(HastenError, match="belong together"):
        run("map", tmp_path / "tree.safetensors", "--k", 4, "--tokens", tmp_path)
    with pytest.raises(HastenError, match="give both"):
        run("inspect", tmp_path / "tree.safetensors", "--decoder", f"{__name__}:gray")
    for name in ("no.such.module:x", "json:nothing", "json:__name__", "json"):
        with pytest.raises(ConfigError, match="--decoder"):
            load_decoder(name)


WORKER = """
import sys, torch
from pathlib import Path
from hasten.tokens import flat_map
from hasten.tokens.shards import TokenShards
from hasten.fitting.token_model import Trainer
from hasten.fitting.token_recipe import Recipe
shards, out, processes, shard, accumulate, minutes = sys.argv[1:]
recipe = Recipe(steps=6, batch=8, accumulate=int(accumulate), lr=5e-3, warmup=2, width=16, layers=2, heads=2)
held = TokenShards.open(shards)
trainer = Trainer(held, flat_map(24), recipe, shard=shard == "shard", cpu=True)
assert trainer.accelerator.num_processes == int(processes)
assert trainer.sharded == (shard == "shard" and int(processes) > 1)
if trainer.sharded:
    sizes = [p.to_local().numel() for p in trainer.causal.parameters()]
    assert sum(sizes) < 0.6 * sum(p.numel() for p in trainer.causal.parameters())
trainer.run(Path(out), held, minutes=None if minutes == "all" else float(minutes), every=3)
"""


def launched(shards, folder, processes, shard="whole", accumulate=1, minutes="all"):
    """Train in processes of their own; the checkpoint."""
    script = folder.parent / "worker.py"
    script.write_text(WORKER)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", str(script)]
    arguments = [str(shards.folder), str(folder), str(processes), shard, str(accumulate), str(minutes)]
    subprocess.run([sys.executable, *launch, *arguments], check=True, env=environment, timeout=300)
    return load_file(folder / "checkpoint.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The checkpoint of one process, and its shards."""
    folder = tmp_path_factory.mktemp("alone")
    classes = np.arange(32) % 4
    shards = write_shards(folder / "fine", (5 * classes[:, None] + np.arange(6)) % 24, 24, classes)
    return launched(shards, folder / "run", 1), shards


@pytest.mark.slow
@pytest.mark.parametrize(("shard", "accumulate"), [("whole", 1), ("whole", 2), ("shard", 1), ("shard", 2)])
def test_two_processes_train_the_model_that_one_trains(shard, accumulate, alone, tmp_path):
    one, shards = alone
    two = launched(shards, tmp_path / "run", 2, shard, accumulate)
    assert one.keys() == two.keys()
    for name in (name for name in one if name.startswith(("model/", "optimizer/"))):
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_a_sharded_run_goes_on_from_its_checkpoint_with_another_number_of_processes(alone, tmp_path):
    one, shards = alone
    launched(shards, tmp_path / "run", 2, "shard", minutes=0)
    again = launched(shards, tmp_path / "run", 1)
    for name in (name for name in one if name.startswith("model/")):
        torch.testing.assert_close(one[name], again[name], rtol=1e-3, atol=1e-4)


def test_a_batch_in_parts_is_the_batch(shards):
    """Whatever the parts, a step is that of all images together."""
    whole, parts = (
        Trainer(shards, MAP, Recipe(batch=8, accumulate=n, width=16, layers=1, heads=2), cpu=True) for n in (1, 4)
    )
    assert whole.step() == pytest.approx(parts.step(), rel=1e-5)
    for a, b in zip(whole.causal.parameters(), parts.causal.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ConfigError, match="3 parts each do not divide the batch of 8"):
        Trainer(shards, MAP, Recipe(batch=8, accumulate=3, width=16, layers=1, heads=2), cpu=True)


def test_conditions_are_dropped_as_often_as_asked_and_need_what_stands_for_none(shards):
    trainer = Trainer(shards, MAP, Recipe(batch=8, condition_dropout=0.5, width=16, layers=1, heads=2), cpu=True)
    ids = torch.cat([trainer.batch(step)[0].ids for step in range(100)])
    none = trainer.conditions.none().ids.item()
    assert 0.4 < (ids == none).float().mean() < 0.6
    assert none not in trainer.conditions.of(torch.arange(4)).ids
    model = trainer.causal
    with pytest.raises(ConfigError, match="ids that stand for none"):
        Trainer(shards, MAP, Recipe(), model, cpu=True)
    with pytest.raises(ConfigError, match="predicts 8 clusters, the map has 9"):
        Trainer(shards, TREE.map(9), Recipe(condition_dropout=0.0), model, cpu=True)
