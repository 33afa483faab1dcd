"""Maps, members, comparators, shards, replaced vocabularies and the refiner."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hasten.errors import AdapterError, ConfigError, ModelError, UnknownNameError
from hasten.tokens import MemberSampler, SemanticTree, TokenMap, flat_map, kmeans_map, random_map, replace_vocabulary
from hasten.tokens.comparators import adjusted_rand, mean_within_distance
from hasten.tokens.export import export_model
from hasten.tokens.members import MEMBER_KINDS
from hasten.tokens.refiner import Refiner, RefinerConfig
from hasten.tokens.shards import TokenShards, write_shards

CODES = np.random.default_rng(0).standard_normal((60, 4))
MAP = SemanticTree.fit(CODES, normalize="none").map(20)
COUNTS = np.random.default_rng(1).integers(0, 50, 60)


@settings(max_examples=25)
@given(hnp.arrays(np.int64, hnp.array_shapes(max_dims=3, max_side=8), elements=st.integers(0, 19)))
@pytest.mark.parametrize("kind", MEMBER_KINDS)
def test_a_drawn_member_is_in_its_cluster(kind, clusters):
    sampler = MemberSampler.make(MAP, kind, codebook=CODES, counts=COUNTS)
    np.testing.assert_array_equal(MAP(sampler(clusters, seed=3)), clusters)


def test_members_are_drawn_as_often_as_they_should_be():
    mapping = TokenMap(np.array([0, 1, 0, 0, 1]))
    clusters = np.repeat([0, 1], 20_000)
    uniform = np.bincount(MemberSampler.make(mapping)(clusters)) / 20_000
    np.testing.assert_allclose(uniform, [1 / 3, 1 / 2, 1 / 3, 1 / 3, 1 / 2], atol=0.02)
    frequent = MemberSampler.make(mapping, "frequency", counts=[1, 0, 3, 0, 0])(clusters)
    np.testing.assert_allclose(np.bincount(frequent) / 20_000, [0.25, 0.5, 0.75, 0, 0.5], atol=0.02)


def test_the_medoid_and_the_central_member_are_what_they_say():
    codebook = np.array([[0.0], [1.0], [10.0], [50.0]])
    mapping = TokenMap(np.array([0, 0, 0, 1]))
    assert MemberSampler.make(mapping, "medoid", codebook=codebook)([0, 1]).tolist() == [1, 3]
    mapping = TokenMap(np.zeros(5, int))
    codebook = np.array([[0.0], [0.1], [0.2], [4.0], [20.0]])  # the mean is 4.9, the median 0.2
    assert MemberSampler.make(mapping, "medoid", codebook=codebook)([0]).tolist() == [2]
    assert MemberSampler.make(mapping, "centroid", codebook=codebook)([0]).tolist() == [3]


def test_what_cannot_be_drawn_is_refused():
    for kind in ("medoid", "centroid"):
        with pytest.raises(ConfigError, match="codebook="):
            MemberSampler.make(MAP, kind)
    with pytest.raises(ConfigError, match="counts="):
        MemberSampler.make(MAP, "frequency")
    with pytest.raises(UnknownNameError, match="medoid"):
        MemberSampler.make(MAP, "medoids")
    with pytest.raises(ConfigError, match="no member"):
        MemberSampler(MAP, np.zeros(60))
    with pytest.raises(ConfigError, match=r"0 \.\. 19"):
        MemberSampler.make(MAP)([20])
    with pytest.raises(ConfigError, match="whole numbers"):
        MemberSampler.make(MAP)([0.5])


def test_a_map_is_read_back_and_lists_its_members(tmp_path):
    again = TokenMap.load(MAP.save(tmp_path / "map.safetensors"))
    np.testing.assert_array_equal(again.labels, MAP.labels)
    assert (again.kind, again.fingerprint) == (MAP.kind, MAP.fingerprint)
    assert sorted(np.concatenate([again.of(c) for c in range(20)]).tolist()) == list(range(60))


def test_tokens_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="vocabulary of 60"):
        MAP([60])
    with pytest.raises(ConfigError, match="vocabulary of 60"):
        MAP([-1])
    with pytest.raises(ConfigError, match="whole numbers"):
        MAP([0.0])
    with pytest.raises(ConfigError, match="cluster 1 has no used member"):
        TokenMap(np.array([0, 2, 2]))
    with pytest.raises(ConfigError, match=r"lie within 0 \.\. 2, got 0 \.\. 1073741824"):
        TokenMap(np.array([0, 1, 1 << 30]))


def test_comparators_have_the_sizes_they_should_have():
    assert flat_map(60).clusters == 60
    assert (np.sort(random_map(MAP, 1).sizes) == np.sort(MAP.sizes)).all()
    assert (random_map(MAP, 1).labels != random_map(MAP, 2).labels).any()
    means = kmeans_map(CODES, 20, runs=3, normalize="none")
    assert means.clusters == 20
    assert mean_within_distance(CODES, means) < 0.7 * mean_within_distance(CODES, random_map(means))
    assert (
        kmeans_map(np.zeros((9, 2)), 9, normalize="none").clusters == 9
    )  # every cluster has a member even where all codes are equal
    with pytest.raises(ConfigError, match=r"1 \.\. 60"):
        kmeans_map(CODES, 61, normalize="none")


def test_adjusted_rand_is_one_for_equal_partitions_and_near_zero_by_chance():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 2000)
    assert adjusted_rand(labels, (labels + 2) % 5) == 1.0
    assert abs(adjusted_rand(labels, rng.permutation(labels))) < 0.02
    assert adjusted_rand([0, 0, 1, 1], [0, 0, 1, 2]) == pytest.approx(4 / 7)


@settings(max_examples=20)
@given(st.integers(1, 30), st.integers(1, 12))
def test_shards_give_back_what_was_written(tmp_path_factory, images, rows):
    tokens = np.random.default_rng(images).integers(0, 60, (images, 7))
    labels = np.arange(images) % 3
    shards = write_shards(tmp_path_factory.mktemp("shards"), tokens, 60, labels, rows)
    pick = np.random.default_rng(0).integers(0, images, 9)
    np.testing.assert_array_equal(shards.take(pick), tokens[pick])
    np.testing.assert_array_equal(shards.labels(pick), labels[pick])
    np.testing.assert_array_equal(shards.token_counts(), np.bincount(tokens.ravel(), minlength=60))


def test_shards_are_mapped_in_memory_and_to_clusters(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 60, (10, 7))
    shards = write_shards(tmp_path / "fine", tokens, 60, rows=4)
    assert isinstance(shards.arrays[0], np.memmap)
    coarse = shards.mapped(MAP, tmp_path / "coarse")
    np.testing.assert_array_equal(TokenShards.open(tmp_path / "coarse").take(range(10)), MAP(tokens))
    assert (coarse.vocabulary, coarse.arrays[0].dtype) == (20, np.uint8)
    with pytest.raises(ConfigError, match="another folder"):
        shards.mapped(flat_map(60), tmp_path / "fine")
    with pytest.raises(ConfigError, match="vocabulary of 60"):
        shards.mapped(flat_map(61), tmp_path / "other")


def test_shards_that_are_broken_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="do not fit"):
        write_shards(tmp_path / "a", [[60]], 60)
    with pytest.raises(ConfigError, match="one class per image"):
        write_shards(tmp_path / "a", [[5]], 60, [1, 2])
    with pytest.raises(ModelError, match=r"index\.json: no such file"):
        TokenShards.open(tmp_path / "a")
    shards = write_shards(tmp_path / "b", [[5, 6]], 60)
    np.save(tmp_path / "b" / "tokens-00000.npy", np.zeros((2, 2), np.uint8))
    with pytest.raises(ModelError, match=r"tokens-00000\.npy is damaged"):
        TokenShards.open(shards.folder)
    with pytest.raises(IndexError):
        shards.take([-1])


def llama(rows=60, tied=False):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=rows,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=tied,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def gpt2(rows=60):
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=rows, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=5, eos_token_id=5)
    )


class LlamaGenLike(nn.Module):
    """The two attributes of LlamaGen's transformer, and its class embedding."""

    def __init__(self):
        super().__init__()
        self.vocab_size = 60
        self.tok_embeddings = nn.Embedding(60, 16)
        self.cls_embedding = nn.Embedding(11, 16)
        self.output = nn.Linear(16, 60, bias=False)

    def forward(self, tokens):
        return self.output(self.tok_embeddings(tokens))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_hugging_face_model_is_converted_exported_and_opened_again(make, tmp_path):
    model = make().eval()
    body = {name: p.clone() for name, p in model.named_parameters() if p.shape[0] != 60}
    done = replace_vocabulary(model, MAP)
    assert done.rows_after == model.config.vocab_size == 20
    assert all(torch.equal(p, body[name]) for name, p in model.named_parameters() if name in body)
    clusters = torch.from_numpy(MAP([[1, 5, 9, 40]])).long()
    output = model(input_ids=clusters, labels=clusters)
    assert output.logits.shape == (1, 4, 20)
    output.loss.backward()
    assert model.get_input_embeddings().weight.grad is not None
    export_model(model, MAP, tmp_path, done.vocabulary)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(again(input_ids=clusters).logits, output.logits)
    assert TokenMap.load(tmp_path / "token_map.safetensors").clusters == 20


def test_tied_weights_stay_tied_and_savings_are_counted():
    model = llama(tied=True)
    before = sum(p.numel() for p in model.parameters())
    done = replace_vocabulary(model, MAP)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert done.tied
    assert done.parameters_saved == 40 * 16 == before - sum(p.numel() for p in model.parameters())


def test_a_llamagen_module_keeps_its_classes_and_the_start_is_as_asked(tmp_path):
    model = LlamaGenLike()
    classes, old = model.cls_embedding.weight.clone(), model.tok_embeddings.weight.detach().clone()
    done = replace_vocabulary(model, MAP, start="mean")
    assert torch.equal(model.cls_embedding.weight, classes)
    assert done.parameters_saved == 2 * 40 * 16
    assert model.vocab_size == 20
    torch.testing.assert_close(model.tok_embeddings.weight[3], old[MAP.of(3)].mean(0))
    export_model(model, MAP, tmp_path, done.vocabulary)
    assert (tmp_path / "model.safetensors").is_file()
    fresh = LlamaGenLike()
    replace_vocabulary(fresh, MAP)
    assert fresh.output.weight.std().item() == pytest.approx(0.02, rel=0.3)


def test_special_rows_move_behind_the_clusters():
    model = llama(63)
    model.config.bos_token_id, model.config.eos_token_id = 61, 7
    old = model.get_input_embeddings().weight[60:].clone()
    done = replace_vocabulary(model, MAP, rows=0)
    assert (done.rows_after, done.kept, done.cleared) == (23, 3, ("eos_token_id",))
    assert torch.equal(model.get_input_embeddings().weight[20:], old)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (21, None)  # a cluster ends no text


def test_models_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(AdapterError, match="tok_embeddings"):
        replace_vocabulary(nn.Linear(2, 2), MAP)
    with pytest.raises(ModelError, match="does not say which rows are image tokens; give rows="):
        replace_vocabulary(llama(63), MAP)
    with pytest.raises(UnknownNameError):
        replace_vocabulary(llama(), MAP, start="zero")
    done = replace_vocabulary(llama(), MAP)
    with pytest.raises(ModelError, match="replace_vocabulary first"):
        export_model(llama(), MAP, tmp_path, done.vocabulary)


def test_the_refiner_learns_which_member_the_hidden_state_means():
    torch.manual_seed(0)
    refiner = Refiner(MAP, RefinerConfig(hidden=8, width=32, heads=2))
    table = torch.randn(60, 8)
    optimizer = torch.optim.AdamW(refiner.parameters(), 3e-3)
    losses = []
    for _ in range(120):
        tokens = torch.randint(60, (16, 6))
        loss = refiner.loss(table[tokens], tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    tokens = torch.randint(60, (32, 6))
    clusters = torch.from_numpy(MAP(tokens.numpy())).long()
    drawn = refiner.sample(table[tokens], clusters, torch.Generator().manual_seed(0))
    assert (MAP(drawn.numpy()) == clusters.numpy()).all()
    chance = float((1 / MAP.sizes[clusters.numpy()]).mean())
    assert (drawn == tokens).float().mean() > (1 + chance) / 2
    assert losses[-1] < 0.5 * losses[0]


def test_the_refiner_looks_back_only_and_needs_fitting_shapes():
    torch.manual_seed(0)
    refiner = Refiner(MAP, RefinerConfig(hidden=8, width=16, heads=2)).eval()
    hidden, clusters = torch.randn(1, 5, 8), torch.randint(20, (1, 5))
    changed = hidden.clone()
    changed[:, 3] += 1
    torch.testing.assert_close(refiner(hidden, clusters)[:, :3], refiner(changed, clusters)[:, :3])
    assert refiner.loss(hidden, torch.randint(60, (1, 5))).isfinite()
    alone = Refiner(flat_map(60), RefinerConfig(hidden=8, width=16, heads=2))
    assert alone.loss(hidden, torch.randint(60, (1, 5))).item() == 0.0
    with pytest.raises(ConfigError, match="hidden must be"):
        refiner(hidden[..., :4], clusters)
    with pytest.raises(ConfigError, match="divide"):
        RefinerConfig(hidden=8, width=10, heads=4)
