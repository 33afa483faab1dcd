"""The models that people train, from a codebook to an exported model: only image rows change, whatever the layout."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_tokens import CODES, MAP, TEXT, TOKENS, USED, chameleon, emu3, janus, llama
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM
from typer.testing import CliRunner

from hasten.cli.tokens import app
from hasten.errors import AdapterError, ConfigError, ModelError
from hasten.fitting.refiner import train_refiner
from hasten.fitting.token_model import Trainer
from hasten.fitting.token_recipe import Conditions, Recipe
from hasten.tokens import MemberSampler, SemanticTree, flat_map, replace_vocabulary
from hasten.tokens.causal import Condition, FunctionModel
from hasten.tokens.export import export_model, open_model
from hasten.tokens.hugging_face import HuggingFaceModel
from hasten.tokens.refiner import Refiner, RefinerConfig
from hasten.tokens.sample import Sampling, sample_clusters
from hasten.tokens.shards import write_shards

# model, options of replace_vocabulary, first image row, rows of text that are kept
LAYOUTS = {
    "llama": (llama, {"rows": TEXT}, TEXT, TEXT),
    "emu3": (emu3, {}, TEXT, TEXT + 2),
    "chameleon": (chameleon, {}, 4, TEXT),
    "janus": (janus, {}, 0, 0),
}
EVERY = pytest.mark.parametrize("layout", LAYOUTS)


def converted(layout, **options):
    make, own, _, _ = LAYOUTS[layout]
    model = make()
    return model, replace_vocabulary(model, MAP, **own, **options)


@EVERY
def test_text_rows_are_what_they_were_and_follow_their_ids(layout):
    make, _, first, kept = LAYOUTS[layout]
    before = make()
    table, head = before.get_input_embeddings().weight, before.get_output_embeddings().weight
    model, done = converted(layout)
    assert (done.vocabulary.offset, done.kept) == (first, kept)
    if layout == "janus":
        assert torch.equal(model.get_input_embeddings().weight, table)
        assert torch.equal(model.get_output_embeddings().weight, head)
        assert model.model.generation_embeddings.num_embeddings == 20
        assert model.model.generation_head.vision_head.out_features == 20
        return
    text = np.setdiff1d(np.arange(len(table)), done.vocabulary.rows)
    ids = torch.from_numpy(done.vocabulary.renumber(text))
    assert torch.equal(model.get_input_embeddings().weight[ids], table[text])
    assert torch.equal(model.get_output_embeddings().weight[ids], head[text])
    assert (ids[: int((text < first).sum())].numpy() == text[text < first]).all()
    assert model.get_input_embeddings().num_embeddings == len(table) - TOKENS + 20
    assert model.config.get_text_config().vocab_size == len(table) - TOKENS + 20


@EVERY
def test_means_are_of_used_members_rows_alone(layout):
    make, _, _, _ = LAYOUTS[layout]
    before = make()
    model, done = converted(layout, start="mean")
    found = done.vocabulary
    for name in (found.embedding, found.head):
        old, new = before.get_submodule(name).weight, model.get_submodule(name).weight
        for cluster in (0, 7, 19):
            members = torch.from_numpy(found.rows[MAP.of(cluster)])
            torch.testing.assert_close(new[found.offset + cluster], old[members].mean(0))
            assert all(USED[token] for token in MAP.of(cluster))


@EVERY
def test_a_sampled_image_is_what_the_model_predicts_and_text_counts(layout):
    model, done = converted(layout)
    causal = HuggingFaceModel(model, done.vocabulary).eval()
    shown = Condition.padded(torch.tensor([[-1, 1, 9], [1, 3, 8]]))
    clusters, states = sample_clusters(causal, shown, 10, Sampling(guidance=2.0), 0, Condition(torch.tensor([[1, 6]])))
    prediction = causal(shown, clusters[:, :-1])
    torch.testing.assert_close(prediction.states, states, atol=1e-5, rtol=1e-4)  # a static cache changes nothing
    assert prediction.logits.shape == (2, 10, 20)
    assert prediction.logits.isfinite().all()
    alone = causal(Condition(shown.ids[:1, 1:]), clusters[:1, :-1])
    torch.testing.assert_close(alone.logits, prediction.logits[:1], atol=1e-5, rtol=1e-4)  # nor does padding
    other = causal(Condition(torch.tensor([[1, 5]])), clusters[:1, :-1])
    assert not torch.allclose(other.logits, alone.logits)


@pytest.mark.parametrize("layout", ["emu3", "llama"])
def test_the_token_that_ends_a_row_is_where_it_belongs(layout):
    """Predictions are those of the whole sequence with it, as the model's own forward has them."""
    model, done = converted(layout)
    end = TEXT + TOKENS if layout == "emu3" else 3
    causal = HuggingFaceModel(model, done.vocabulary, row_length=4, row_end=end).eval()
    shown = Condition(torch.tensor([[1, 9], [1, 8]]))
    clusters, states = sample_clusters(causal, shown, 9)
    new_end = int(done.vocabulary.renumber(end))
    rows = [torch.cat([row + done.vocabulary.offset, torch.full((2, 1), new_end)], 1) for row in clusters.split(4, 1)]
    whole = torch.cat([shown.ids, *rows], dim=1)[:, :-2]  # without the last cluster and the end of its row
    logits = model(input_ids=whole).logits
    first = done.vocabulary.offset
    places = [1, 2, 3, 4, 6, 7, 8, 9, 11]  # the states before each cluster
    expected = logits[:, places, first : first + 20]
    torch.testing.assert_close(causal(shown, clusters[:, :-1]).logits, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(causal(shown, clusters[:, :-1]).states, states, atol=1e-5, rtol=1e-4)


@EVERY
def test_an_exported_model_is_opened_as_it_was(layout, tmp_path):
    model, done = converted(layout)
    export_model(model, MAP, tmp_path, done.vocabulary)
    opened = open_model(tmp_path)
    assert type(opened.model) is type(model)
    assert {name: value.shape for name, value in opened.model.state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }
    assert all(
        torch.equal(a, b) for a, b in zip(opened.model.state_dict().values(), model.state_dict().values(), strict=True)
    )
    np.testing.assert_array_equal(opened.vocabulary.new_ids, done.vocabulary.new_ids)
    assert (opened.vocabulary.embedding, opened.mapping.fingerprint) == (done.vocabulary.embedding, MAP.fingerprint)
    shown, clusters = Condition(torch.tensor([[1, 9]])), torch.tensor([[3, 19, 0]])
    a, b = (
        HuggingFaceModel(m, v)(shown, clusters).logits
        for m, v in ((model, done.vocabulary), (opened.model, opened.vocabulary))
    )
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", ["emu3", "chameleon"])
def test_the_models_own_way_from_codes_to_rows_gives_clusters_and_back_a_used_code(layout, tmp_path):
    model, done = converted(layout)
    export_model(model, MAP, tmp_path, done.vocabulary)
    for one in (model, open_model(tmp_path).model):
        known = one.model.vocabulary_mapping
        codes = torch.arange(TOKENS).reshape(8, 8)
        rows = known.convert_img2bpe(codes)[:, :8]
        np.testing.assert_array_equal(rows.numpy() - done.vocabulary.offset, MAP(codes.numpy()))
        assert known.image_token_id == done.vocabulary.renumber(5 if layout == "emu3" else 4 + TOKENS + 5)
        if layout == "emu3":
            assert known.eol_token_id == TEXT + 20
            back = known.convert_bpe2img(torch.cat([rows, rows[:, :1]], dim=1)).numpy()
            np.testing.assert_array_equal(MAP(back), MAP(codes.numpy()))
            assert (USED[back] > 0).all()


@EVERY
def test_a_converted_model_is_trained_with_texts_sampled_and_refined(layout, tmp_path):
    """Images that the text tells: the loss falls far below chance, and samples show what was asked for."""
    model, done = converted(layout)
    kind = np.arange(32) % 2
    codes = np.flatnonzero(USED)
    tokens = codes[np.where(kind[:, None] == 0, np.arange(6), 20 + np.arange(6))]
    texts = np.where(kind[:, None] == 0, [[-1, 1, 8]], [[1, 6, 9]])
    shards = write_shards(tmp_path / "fine", tokens, TOKENS, texts, codebook=CODES)
    causal = HuggingFaceModel(model, done.vocabulary)
    conditions = Conditions(without=torch.tensor([1]))
    recipe = Recipe(steps=120 if layout == "janus" else 60, batch=8, accumulate=2, lr=1e-2, warmup=5)
    trainer = Trainer(shards, MAP, recipe, causal, conditions, cpu=True)
    assert trainer.run(tmp_path / "run", shards, every=30)
    assert trainer.evaluate(shards)["loss"] < 0.25 * np.log(20)
    shown = conditions.of(torch.tensor([[-1, 1, 8], [1, 6, 9]]))
    clusters, _ = sample_clusters(causal, shown, 6, Sampling(temperature=0.2, guidance=1.5), 0, conditions.none())
    assert (clusters.numpy() == MAP(tokens[:2])).mean() > 0.8
    refiner = Refiner(MAP, RefinerConfig(hidden=16, width=16, heads=2))
    losses = train_refiner(causal, refiner, shards, conditions, steps=40, lr=1e-2)
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    export_model(model, MAP, tmp_path / "model", done.vocabulary)
    again = HuggingFaceModel(open_model(tmp_path / "model").model, done.vocabulary)
    torch.testing.assert_close(again(shown, clusters).logits, causal.eval()(shown, clusters).logits)
    drawn = MemberSampler.make(MAP)(clusters.numpy())
    assert (USED[drawn] > 0).all()


def test_a_llama_of_100_text_and_1024_image_rows_goes_from_codebook_to_export(tmp_path):
    codes = np.random.default_rng(0).standard_normal((1024, 8)).astype(np.float32)
    counts = np.random.default_rng(1).integers(0, 3, 1024)
    mapping = SemanticTree.fit(codes, used=counts, normalize="none").map(128, max_size=32)
    model = llama(100, 1024, eos_token_id=100 + 7, bos_token_id=99)
    text = model.get_input_embeddings().weight[:100].clone()
    done = replace_vocabulary(model, mapping, rows=range(100, 1124), start="mean")
    assert done.cleared == ("eos_token_id",)
    assert (model.config.eos_token_id, model.generation_config.eos_token_id, model.config.bos_token_id) == (
        None,
        None,
        99,
    )
    assert torch.equal(model.get_input_embeddings().weight[:100], text)
    tokens = np.flatnonzero(counts)[np.random.default_rng(2).integers(0, 40, (16, 8))]
    shards = write_shards(tmp_path / "fine", tokens, 1024, np.arange(16) % 3, codebook=codes)
    causal = HuggingFaceModel(model, done.vocabulary)
    conditions = Conditions(first_class=10, without=torch.tensor([99]))
    trainer = Trainer(shards, mapping, Recipe(steps=20, batch=8, lr=1e-2, warmup=2), causal, conditions, cpu=True)
    first = trainer.evaluate(shards)["loss"]
    trainer.run(tmp_path / "run")
    assert trainer.evaluate(shards)["loss"] < first
    clusters, _ = sample_clusters(causal, conditions.of(torch.tensor([0, 2])), 8, Sampling(top_k=5))
    drawn = MemberSampler.make(mapping, "medoid", codebook=codes)(clusters.numpy())
    assert (counts[drawn] > 0).all()
    export_model(model, mapping, tmp_path / "model", done.vocabulary)
    assert type(model).from_pretrained(tmp_path / "model").config.vocab_size == 228


def test_ids_inside_the_image_rows_are_cleared_and_others_follow_their_rows():
    model = llama(eos_token_id=[2, TEXT + 3], pad_token_id=TEXT + 5)
    done = replace_vocabulary(model, MAP, rows=TEXT)
    assert (model.config.eos_token_id, model.config.pad_token_id) == ([2], None)
    assert set(done.cleared) == {"eos_token_id", "pad_token_id"}
    assert model.get_input_embeddings().padding_idx is None
    behind = llama(eos_token_id=TOKENS + 9)
    replace_vocabulary(behind, MAP, rows=0)
    assert (behind.config.eos_token_id, behind.config.bos_token_id) == (20 + 9, None)


@pytest.mark.parametrize("tied", [True, False])
def test_scattered_rows_a_tie_and_a_bias_are_kept(tied):
    model = llama(tie_word_embeddings=tied)
    if not tied:
        model.lm_head = nn.Linear(16, TEXT + TOKENS)
    rows = np.random.default_rng(0).permutation(TEXT + TOKENS)[:TOKENS]
    table, bias = model.get_input_embeddings().weight.clone(), getattr(model.lm_head.bias, "data", None)
    done = replace_vocabulary(model, MAP, rows=rows, start="mean")
    text = np.setdiff1d(np.arange(TEXT + TOKENS), rows)
    ids = done.vocabulary.renumber(text)
    assert torch.equal(model.get_input_embeddings().weight[ids], table[text])
    assert (model.get_input_embeddings().weight is model.lm_head.weight) == tied == done.tied
    first = done.vocabulary.offset
    members = torch.from_numpy(rows[MAP.of(3)])
    torch.testing.assert_close(model.get_input_embeddings().weight[first + 3], table[members].mean(0))
    if bias is not None:
        assert torch.equal(model.lm_head.bias[ids], bias[text])
        torch.testing.assert_close(model.lm_head.bias[first + 3], bias[members].mean())
    np.testing.assert_array_equal(done.vocabulary.renumber(rows), first + MAP.labels)


class JanusOfItsOwn(nn.Module):
    """The names of Janus's own repository."""

    def __init__(self):
        super().__init__()
        self.gen_embed = nn.Embedding(TOKENS, 4)
        self.gen_head = nn.Module()
        self.gen_head.vision_head = nn.Linear(16, TOKENS)
        self.language_model = llama(0)


def test_other_tables_are_found_by_name_or_refused():
    model = JanusOfItsOwn()
    text = model.language_model.lm_head.weight.clone()
    assert replace_vocabulary(model, MAP).vocabulary.head == "gen_head.vision_head"
    assert model.gen_head.vision_head.bias.shape == (20,)
    assert torch.equal(model.language_model.lm_head.weight, text)
    named = JanusOfItsOwn()
    assert replace_vocabulary(named, MAP, embedding="gen_embed", head="gen_head.vision_head").rows_after == 20
    doubtful = llama(0)
    doubtful.image_table = nn.Embedding(TOKENS, 16)
    with pytest.raises(AdapterError, match=r"both model\.embed_tokens and image_table"):
        replace_vocabulary(doubtful, MAP)
    assert replace_vocabulary(doubtful, MAP, rows=0).rows_after == 20
    with pytest.raises(AdapterError, match="no module 'table'"):
        replace_vocabulary(llama(), MAP, embedding="table", head="lm_head")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ModelError, "does not say which rows are image tokens"),
        ({"rows": TEXT + 1}, ConfigError, r"not all in 0 \.\. 103"),
        ({"rows": range(5)}, ConfigError, "64 whole numbers"),
        ({"rows": [3] * TOKENS}, ConfigError, "a row twice"),
        ({"rows": True}, ConfigError, "64 whole numbers"),
        ({"embedding": "model.embed_tokens"}, ConfigError, "belong together"),
    ],
)
def test_rows_that_cannot_be_the_image_tokens_are_refused_and_nothing_is_changed(options, error, message):
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        replace_vocabulary(model, MAP, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_that_says_which_rows_are_image_tokens_is_believed():
    with pytest.raises(ModelError, match="itself says that image token 0 is row 40, rows= says 0"):
        replace_vocabulary(emu3(), MAP, rows=0)
    with pytest.raises(ModelError, match="names 64 image tokens, the map has 30"):
        replace_vocabulary(chameleon(), flat_map(30))


class LlamaGenLike(nn.Module):
    """The tables of LlamaGen's transformer with a class in front, and a running mean of what came before."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(vocab_size=TOKENS)
        self.vocab_size = TOKENS
        self.cls_embedding = nn.Embedding(4, 16)
        self.tok_embeddings = nn.Embedding(TOKENS, 16)
        self.output = nn.Linear(16, TOKENS, bias=False)

    def states(self, condition, clusters):
        inputs = torch.cat([self.cls_embedding(condition.ids), self.tok_embeddings(clusters)], dim=1)
        return inputs + 0.1 * inputs.cumsum(1)


def test_a_module_of_llamagens_kind_is_trained_sampled_exported_and_opened(tmp_path):
    model = LlamaGenLike()
    done = replace_vocabulary(model, MAP)
    assert model.config.vocab_size == model.vocab_size == 20

    def forward(condition, clusters):
        states = model.states(condition, clusters)
        return model.output(states), states

    causal = FunctionModel(model, forward, 20)
    codes = np.flatnonzero(USED)
    shards = write_shards(
        tmp_path / "fine", codes[np.arange(32)[:, None] % 3 * 9 + np.arange(5)], TOKENS, np.arange(32) % 3
    )
    conditions = Conditions(without=torch.tensor([3]))
    trainer = Trainer(shards, MAP, Recipe(steps=150, batch=8, lr=3e-2, warmup=5), causal, conditions, cpu=True)
    trainer.run(tmp_path / "run")
    assert trainer.evaluate(shards)["loss"] < 0.6 * np.log(20)
    clusters, states = sample_clusters(causal, conditions.of(torch.arange(3)), 5, Sampling(temperature=0.1))
    assert (clusters.numpy() == MAP(shards.take([0, 1, 2]))).mean() > 0.7
    torch.testing.assert_close(causal(conditions.of(torch.arange(3)), clusters[:, :-1]).states, states)
    export_model(model, MAP, tmp_path / "model", done.vocabulary)
    opened = open_model(tmp_path / "model", LlamaGenLike())
    assert all(
        torch.equal(a, b) for a, b in zip(opened.model.state_dict().values(), model.state_dict().values(), strict=True)
    )
    with pytest.raises(ModelError, match="transformers has no model 'LlamaGenLike'; give model="):
        open_model(tmp_path / "model")


class Changing(LlamaForCausalLM):
    """A model of tomorrow: nobody knows the name of what it does."""

    change = "none"

    def forward(self, input_ids=None, inputs_embeds=None, **options):
        inputs_embeds = self.model.embed_tokens(input_ids) * (2 if self.change == "inputs" else 1)
        states = self.model(inputs_embeds=inputs_embeds, **options).last_hidden_state
        logits = self.lm_head(states * 1.1 if self.change == "states" else states)
        if self.change == "cap":
            logits = 30 * torch.tanh(logits / 30)
        if self.change == "shift":
            logits = logits + 0.01 * torch.arange(logits.shape[-1])
        if self.change == "text":
            logits = logits.clone()
            logits[..., TEXT:] = torch.finfo(logits.dtype).min
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", ["none", "text", "inputs", "states", "cap", "shift"])
def test_what_a_model_does_to_its_logits_is_not_left_out(change, dtype):
    torch.manual_seed(0)
    model = Changing(llama().config).eval().to(dtype)
    model.change = change
    done = replace_vocabulary(model, MAP, rows=TEXT)
    if change in ("none", "text"):
        assert HuggingFaceModel(model, done.vocabulary).takes_cache
        return
    with pytest.raises(AdapterError, match=r"other states|after its head"):
        HuggingFaceModel(model, done.vocabulary)


def test_rows_of_an_image_are_given_with_their_end():
    model = llama()
    done = replace_vocabulary(model, MAP, rows=TEXT)
    with pytest.raises(ConfigError, match="belong together"):
        HuggingFaceModel(model, done.vocabulary, row_length=4)


def test_no_mask_is_made_where_there_is_no_padding_and_half_precision_is_kept(monkeypatch, tmp_path):
    model, done = converted("llama")
    causal, masks = HuggingFaceModel(model, done.vocabulary).eval(), []
    forward = type(model.model).forward
    monkeypatch.setattr(
        type(model.model),
        "forward",
        lambda self, *args, **kw: masks.append(kw["attention_mask"]) or forward(self, *args, **kw),
    )
    even, padded = Condition(torch.tensor([[1, 9]])), Condition.padded(torch.tensor([[-1, 9]]))
    sample_clusters(causal, even, 4, Sampling(guidance=2.0), without=Condition(torch.tensor([[1, 3]])))
    assert set(masks) == {None}
    for shown, none in ((padded, Condition(torch.tensor([[1, 3]]))), (even, Condition(torch.tensor([[3]])))):
        masks.clear()
        sample_clusters(causal, shown, 4, Sampling(guidance=2.0), without=none)
        assert all(mask is not None for mask in masks)
    export_model(model.to(torch.bfloat16), MAP, tmp_path, done.vocabulary)
    assert open_model(tmp_path, dtype=torch.bfloat16).model.dtype == torch.bfloat16
    assert open_model(tmp_path).model.dtype == torch.float32


def test_a_bfloat16_model_is_trained_kept_and_gone_on_with(tmp_path):
    model, done = converted("emu3")
    causal = HuggingFaceModel(model.to(torch.bfloat16), done.vocabulary)
    shards = write_shards(
        tmp_path / "fine", np.flatnonzero(USED)[np.arange(48).reshape(8, 6)], TOKENS, np.full((8, 1), 3)
    )
    recipe = Recipe(steps=4, batch=4, lr=1e-2, condition_dropout=0.0)
    trainer = Trainer(shards, MAP, recipe, causal, cpu=True)
    trainer.run(tmp_path / "run", every=2)
    fresh, again = converted("emu3")
    second = Trainer(shards, MAP, recipe, HuggingFaceModel(fresh.to(torch.bfloat16), again.vocabulary), cpu=True)
    second.restore(tmp_path / "run" / "checkpoint.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(causal.parameters(), second.causal.parameters(), strict=True))
    moments = [trainer.optimizer.state[p]["exp_avg"] for p in causal.trained()]
    for moment, parameter in zip(moments, second.causal.trained(), strict=True):
        assert torch.equal(moment, second.optimizer.state[parameter]["exp_avg"])


@EVERY
def test_training_leaves_what_images_do_not_need_as_it_was(layout, tmp_path):
    """Text rows that no condition has, a tokenizer within the model, a vision tower, a text head."""
    model, done = converted(layout)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shards = write_shards(
        tmp_path / "fine", np.flatnonzero(USED)[np.arange(48).reshape(8, 6)], TOKENS, np.full((8, 1), 3)
    )
    causal = HuggingFaceModel(model, done.vocabulary)
    trainer = Trainer(shards, MAP, Recipe(steps=5, batch=8, lr=0.1, condition_dropout=0.0), causal, cpu=True)
    trainer.run(tmp_path / "run")
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {done.vocabulary.embedding + ".weight", done.vocabulary.head + ".weight"} <= changed
    assert not {name for name in changed if "vqmodel" in name or "vision_model" in name}
    table = model.get_input_embeddings().weight
    name = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    text = np.setdiff1d(np.arange(model.get_input_embeddings().num_embeddings), [3])
    if layout != "janus":
        text = np.setdiff1d(text, done.vocabulary.offset + np.arange(20))
        assert not torch.equal(
            after["lm_head.weight"][done.vocabulary.offset], before["lm_head.weight"][done.vocabulary.offset]
        )
        assert torch.equal(after["lm_head.weight"][text], before["lm_head.weight"][text])
    assert torch.equal(table[text], before[f"{name}.weight"][text])


def test_a_model_with_learned_positions_is_sampled_as_it_predicts():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=TOKENS, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()
    model.config.eos_token_id = model.config.bos_token_id = None
    causal = HuggingFaceModel(model, replace_vocabulary(model, MAP).vocabulary).eval()
    shown = Condition.padded(torch.tensor([[-1, 1], [2, 3]]))
    clusters, states = sample_clusters(causal, shown, 8)
    torch.testing.assert_close(causal(shown, clusters[:, :-1]).states, states, atol=1e-5, rtol=1e-4)


def test_forwards_and_conditions_that_do_not_fit_are_refused():
    shown = Condition(torch.tensor([[0]]))
    wrong = FunctionModel(nn.Linear(1, 1), lambda condition, clusters: torch.zeros(1, 1, 19), 20)
    with pytest.raises(ConfigError, match=r"expected \[B, l \+ 1, k\] = \(1, 1, 20\)"):
        wrong(shown, torch.empty(1, 0, dtype=torch.long))
    with pytest.raises(ConfigError, match="in front"):
        Condition.padded(torch.tensor([[1, -1]]))
    with pytest.raises(ConfigError, match="without="):
        sample_clusters(wrong, shown, 3, Sampling(guidance=2.0))


def test_a_model_folder_is_converted_by_the_command(tmp_path):
    llama().save_pretrained(tmp_path / "model")
    MAP.save(tmp_path / "map.safetensors")
    arguments = ["convert", tmp_path / "model", "--map", tmp_path / "map.safetensors", "--out", tmp_path / "out"]
    with pytest.raises(ModelError, match="give --rows "):
        CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    result = CliRunner().invoke(
        app, [str(a) for a in [*arguments, "--rows", TEXT, "--start", "mean"]], catch_exceptions=False
    )
    assert "104 to 60 rows (40 of text kept)" in result.output
    assert open_model(tmp_path / "out").vocabulary.offset == TEXT
    with pytest.raises(ModelError, match="no class-conditional model"):
        CliRunner().invoke(
            app, ["sample", str(tmp_path / "out"), "--classes", "0", "--length", "4"], catch_exceptions=False
        )
