"""What would have ended in a wrong result with success reported: refused by name, and nothing written or changed."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_tokens import CODES, MAP, TEXT, TOKENS, USED, emu3, llama
from torch import nn
from typer.testing import CliRunner

from hasten.cli.tokens import app
from hasten.errors import AdapterError, ConfigError, FileError, ModelError, NonFiniteError
from hasten.fitting.refiner import train_refiner
from hasten.fitting.token_model import Trainer
from hasten.fitting.token_recipe import Conditions, Recipe
from hasten.tokens import SemanticTree, replace_vocabulary
from hasten.tokens.causal import Condition, FunctionModel
from hasten.tokens.export import export_model
from hasten.tokens.hugging_face import HuggingFaceModel
from hasten.tokens.refiner import Refiner, RefinerConfig
from hasten.tokens.residual import ResidualMaps
from hasten.tokens.sample import Sampling, filtered, sample_clusters
from hasten.tokens.shards import TokenShards, write_shards

SHOWN = Condition(torch.tensor([[1, 3]]))


def command(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def files(tmp_path):
    """A tree, a map and shards of the tiny codebook, shards of another one, and a model."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "codes.npy", CODES)
    SemanticTree.fit(CODES, normalize="none", used=USED).save(tmp_path / "tree.safetensors")
    MAP.save(tmp_path / "map.safetensors")
    tokens = rng.choice(np.flatnonzero(USED), (16, 6))
    for name, codes in (("fine", CODES), ("foreign", CODES + 1)):
        write_shards(tmp_path / name, tokens, TOKENS, np.arange(16) % 3, codebook=codes)
    llama().save_pretrained(tmp_path / "model")
    return tmp_path


@pytest.mark.parametrize("make", [llama, emu3])
def test_a_converted_model_that_was_saved_plainly_keeps_its_mark(make, tmp_path):
    """Whichever of its parts is saved; text rows were taken for image rows."""
    model = make()
    replace_vocabulary(model, MAP, **({"rows": TEXT} if make is llama else {}))
    model.save_pretrained(tmp_path / "plain")
    again = type(model).from_pretrained(tmp_path / "plain")
    assert again.config.get_text_config().hasten_clusters == 20
    with pytest.raises(ModelError, match="rows of clusters already"):
        replace_vocabulary(again, MAP, rows=0)


def test_a_converted_folder_is_not_converted_again_by_the_command(files):
    arguments = ["convert", files / "model", "--map", files / "map.safetensors", "--rows", TEXT, "--out"]
    command(*arguments, files / "out")
    before = contents(files)
    with pytest.raises(ModelError, match="a model of clusters already"):
        command("convert", files / "out", *arguments[2:], files / "twice")
    assert contents(files) == before


def test_a_module_has_one_vocabulary_of_clusters(tmp_path):
    """The export of a second one could not be opened."""
    model = nn.ModuleDict({"a": nn.Embedding(TOKENS, 4), "b": nn.Embedding(TOKENS, 4)})
    model.update({"ha": nn.Linear(4, TOKENS), "hb": nn.Linear(4, TOKENS)})
    replace_vocabulary(model, MAP, embedding="a", head="ha")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match="takes them once"):
        replace_vocabulary(model, MAP, embedding="b", head="hb")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_wrapped_is_refused_before_anything_changes(tmp_path):
    inner = llama()
    compiled = torch.compile(inner)
    with pytest.raises(AdapterError, match=r"the model is wrapped \(OptimizedModule\); give what is within it"):
        replace_vocabulary(compiled, MAP, rows=TEXT)
    assert inner.lm_head.out_features == inner.config.vocab_size == TEXT + TOKENS
    within = llama()
    within.model = torch.compile(within.model)
    with pytest.raises(AdapterError, match="model is wrapped"):
        replace_vocabulary(within, MAP, rows=TEXT)
    done = replace_vocabulary(inner, MAP, rows=TEXT)
    for wrapped in (compiled, nn.DataParallel(inner)):
        with pytest.raises(AdapterError, match="is wrapped"):
            export_model(wrapped, MAP, tmp_path / "out", done.vocabulary)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "line",
    [
        "fit codes.npy --tokens fine --out fine/tokens-00000.npy",
        "fit codes.npy --tokens fine --out fine/tree.safetensors",
        "map tree.safetensors --k 20 --tokens fine --mapped out --out fine/index.json",
        "map tree.safetensors --k 20 --out map.safetensors --tokens fine --mapped fine/below",
        "convert model --map map.safetensors --rows 40 --out model",
        "convert model --map map.safetensors --rows 40 --out model/below",
        "train fine --map map.safetensors --out fine",
        "train fine --map map.safetensors --held-out foreign --out foreign",
        "refine fine --model model --out fine/labels-00000.npy",
        "refine fine --model model --out model/model.safetensors",
        "sample model --classes 0 --length 4 --out model/config.json",
        "sample model --classes 0 --length 4 --tokens fine --out fine/s.npy",
    ],
)
def test_no_command_writes_into_what_it_reads(line, files, monkeypatch):
    monkeypatch.chdir(files)
    before = contents(files)
    with pytest.raises(FileError, match=r"which is read|what is read from it"):
        command(*line.split())
    assert contents(files) == before


def test_a_picture_does_not_take_the_place_of_the_tokens(files):
    with pytest.raises(ConfigError, match="the picture of --decoder goes there"):
        command(
            "sample",
            files / "model",
            *["--classes", "0", "--length", "4", "--decoder", "math:sqrt", "--out"],
            files / "x.png",
        )


def test_a_refiner_is_not_trained_on_tokens_of_another_codebook(files):
    model = llama()
    causal = HuggingFaceModel(model, replace_vocabulary(model, MAP, rows=TEXT).vocabulary)
    fresh = Refiner(MAP, RefinerConfig(hidden=16, width=8, heads=2))
    for refiner in (fresh, Refiner.load(fresh.save(files / "refiner.safetensors"))):
        with pytest.raises(ModelError, match="use the map of this tokenizer"):
            train_refiner(causal, refiner, TokenShards.open(files / "foreign"), Conditions(), steps=1)
        refiner.check(MAP)
        other = SimpleNamespace(labels=MAP.labels, used=MAP.used, fingerprint="other")
        with pytest.raises(ModelError, match="another map"):
            refiner.check(type(MAP)(other.labels, fingerprint=other.fingerprint, used=other.used))


def test_a_shorter_set_of_residual_maps_is_not_mixed_with_a_longer_one(tmp_path):
    books = np.random.default_rng(1).standard_normal((4, 32, 4))
    ResidualMaps.fit(books, (8, 5, 4, 3)).save(tmp_path)
    two = ResidualMaps.fit(books[:2], (7, 6))
    assert ResidualMaps.load(two.save(tmp_path)).codebooks == (7, 6)
    (tmp_path / "notes.txt").write_text("of the user")
    two.maps[1].save(tmp_path / "map-0.safetensors")
    with pytest.raises(ModelError, match=r"'map-0\.safetensors' is missing, damaged or changed"):
        ResidualMaps.load(tmp_path)


def constant(logits):
    """A model whose logits are these, whatever it is given."""
    return FunctionModel(
        nn.Linear(1, 1),
        lambda condition, clusters: logits[: len(condition), None].repeat(1, clusters.shape[1] + 1, 1),
        4,
    )


def test_nothing_is_drawn_of_what_is_no_number():
    hole = torch.tensor([[0.0, float("nan"), 0, 0], [0, 0, 0, 0]])
    with pytest.raises(NonFiniteError, match="logits of 1 of 2 images are no numbers"):
        sample_clusters(constant(hole), Condition(torch.tensor([[1], [2]])), 3)
    guided = torch.tensor([[0.0, 0, 0, 0], [0, -torch.inf, 0, 0]])  # the second is that of no condition
    with pytest.raises(NonFiniteError, match="with guidance, leave out minus infinity"):
        sample_clusters(constant(guided), Condition(torch.tensor([[1]])), 3, Sampling(guidance=2.0), without=SHOWN)
    refiner = Refiner(MAP, RefinerConfig(hidden=4, width=8, heads=2))
    with pytest.raises(NonFiniteError, match="of 3 positions"):
        refiner.sample(torch.tensor([[[0.0] * 4, [0.0] * 4, [float("nan")] * 4]]), torch.tensor([[1, 2, 3]]))


def test_training_stops_at_what_is_no_number_and_keeps_none_of_it(files):
    model = llama()
    done = replace_vocabulary(model, MAP, rows=TEXT)
    causal, shards = HuggingFaceModel(model, done.vocabulary), TokenShards.open(files / "fine")
    recipe = Recipe(steps=4, batch=4, condition_dropout=0.0)
    trainer = Trainer(shards, MAP, recipe, causal, cpu=True)
    refiner = Refiner(MAP, RefinerConfig(hidden=16, width=8, heads=2))
    with torch.no_grad():
        model.lm_head.weight[TEXT + 3] = float("nan")
        refiner.head.weight[:] = float("nan")
    with pytest.raises(NonFiniteError, match="step 4: the loss is nan"):
        trainer.run(files / "run")
    assert not (files / "run" / "checkpoint.safetensors").exists()
    with pytest.raises(NonFiniteError, match="step 1: the loss of the refiner is nan"):
        train_refiner(causal, refiner, shards, Conditions(), steps=2)


def test_the_time_is_looked_at_after_each_step(files):
    trainer = Trainer(
        TokenShards.open(files / "fine"), MAP, Recipe(steps=500, batch=4, width=16, layers=1, heads=2), cpu=True
    )
    assert not trainer.run(files / "run", minutes=1e-6)
    assert trainer.steps == 1
    assert [json.loads(line)["step"] for line in (files / "run" / "log.jsonl").read_text().splitlines()] == [1]


def test_a_model_is_in_its_own_mode_after_it_was_run(files):
    model = llama()
    causal = HuggingFaceModel(model, replace_vocabulary(model, MAP, rows=TEXT).vocabulary).train()
    model.model.layers[0].eval()
    before = [module.training for module in causal.modules()]
    sample_clusters(causal, SHOWN, 3)
    refiner = Refiner(MAP, RefinerConfig(hidden=16, width=8, heads=2))
    train_refiner(causal, refiner, TokenShards.open(files / "fine"), Conditions(), steps=1)
    assert [module.training for module in causal.modules()] == before
    assert len(set(before)) == 2


def test_top_k_keeps_as_many_of_equal_clusters():
    assert (filtered(torch.zeros(3, 6), Sampling(top_k=2)) > 0).sum(-1).tolist() == [2, 2, 2]


def test_a_map_of_foreign_shards_is_not_written(files):
    with pytest.raises(ModelError, match="use the map of this tokenizer"):
        command(
            *("map", files / "tree.safetensors", "--k", 20, "--out", files / "new.safetensors"),
            *("--tokens", files / "foreign", "--mapped", files / "coarse"),
        )
    assert not (files / "new.safetensors").exists()
    assert not list((files / "coarse").glob("*"))


def test_messages_of_the_commands_name_their_options(files):
    command("train", files / "fine", "--map", files / "map.safetensors", "--out", files / "run", *tiny())
    sample = ["sample", files / "run" / "model", "--length", 4, "--out", files / "s.npy", "--classes"]
    for classes in ("0,,1", "0,", ""):
        with pytest.raises(ConfigError, match="--classes takes whole numbers"):
            command(*sample, classes)
    for members, option in (("medoid", "codebook"), ("centroid", "codebook"), ("frequency", "tokens")):
        with pytest.raises(ConfigError, match=f"give --{option}$"):
            command(*sample, "0", "--members", members)
    with pytest.raises(ConfigError, match="--k must be"):
        command("map", files / "tree.safetensors", "--k", 60, "--out", files / "new.safetensors")
    for decoder in ("math:sqrt", "numpy:copy"):
        with pytest.raises(ConfigError, match=rf"--decoder {decoder}: (cannot draw|gave)"):
            command(*sample, "0", "--decoder", decoder)


def tiny():
    return ["--steps", "1", "--batch", "4", "--width", "16", "--layers", "1", "--heads", "2"]
