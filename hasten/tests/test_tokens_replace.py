"""What replacing rows would lose or leave behind, silently: refused by name, or carried over."""

import copy

import numpy as np
import pytest
import tiny_tokens
import torch
import transformers
from tiny_tokens import BODY, CODES, MAP, TEXT, TOKENS, llama
from torch import nn

from hasten.errors import AdapterError, ConfigError, HastenWarning, ModelError
from hasten.tokens import SemanticTree, flat_map, replace_vocabulary
from hasten.tokens.causal import Condition
from hasten.tokens.export import export_model, open_model
from hasten.tokens.hugging_face import HuggingFaceModel
from hasten.tokens.sample import Sampling, sample_clusters
from hasten.tokens.vocabulary import Vocabulary


def hook(model):
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: 2 * output)


def pre_hook(model):
    model.lm_head.register_forward_pre_hook(lambda module, inputs: None)


def own_forward(model):
    """As accelerate does when it spreads a model over devices."""
    old = model.lm_head.forward
    model.lm_head.forward = lambda states: 2 * old(states)


def alias(model):
    model.second = model.model.embed_tokens


def shared(model):
    model.draft = nn.Linear(16, TEXT + TOKENS, bias=False)
    model.draft.weight = model.lm_head.weight


def whole_numbers(model):
    model.lm_head.weight = nn.Parameter(torch.ones(TEXT + TOKENS, 16, dtype=torch.int8), requires_grad=False)


def without_numbers(model):
    model.to("meta")


def normed(model):
    nn.utils.parametrizations.weight_norm(model.lm_head)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (hook, r"model\.embed_tokens has hooks or a forward of its own"),
        (pre_hook, "lm_head has hooks or a forward of its own"),
        (own_forward, "lm_head has hooks or a forward of its own"),
        (alias, r"second of .* shares numbers of model\.embed_tokens"),
        (shared, r"draft of .* shares numbers of lm_head"),
        (whole_numbers, r"lm_head is a Parameter of torch\.int8"),
        (without_numbers, "on no device"),
        (normed, "expected a plain Embedding and a plain Linear"),
    ],
)
def test_tables_that_are_not_all_there_is_are_refused_and_nothing_is_changed(change, message):
    model = llama()
    change(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AdapterError, match=message):
        replace_vocabulary(model, MAP, rows=TEXT)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(value.is_meta or torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.parametrize("layout", ["llama", "emu3", "chameleon", "janus"])
def test_a_model_that_was_converted_is_not_converted_again(layout, tmp_path):
    """Emu3 and Chameleon said so many rows twice, and a text-last table lost text rows."""
    model = getattr(tiny_tokens, layout)()
    options = {"rows": TEXT} if layout == "llama" else {}
    done = replace_vocabulary(model, MAP, **options)
    opened = open_model(export_model(model, MAP, tmp_path / "model", done.vocabulary)).model
    for one in (model, opened, copy.deepcopy(model)):
        rows = [len(p) for p in one.parameters()]
        for mapping in (MAP, flat_map(20)):
            with pytest.raises(ModelError, match="rows of clusters already"):
                replace_vocabulary(one, mapping, **options)
        assert rows == [len(p) for p in one.parameters()]


def test_options_of_the_table_are_kept():
    model = llama()
    table = model.model.embed_tokens
    table.max_norm, table.norm_type, table.scale_grad_by_freq, table.sparse = 0.1, 1.0, True, True
    replace_vocabulary(model, MAP, rows=TEXT)
    new = model.model.embed_tokens
    assert new is not table
    assert (new.max_norm, new.norm_type, new.scale_grad_by_freq, new.sparse) == (0.1, 1.0, True, True)


def test_words_of_ids_follow_their_rows_and_words_with_image_tokens_are_dropped():
    model = llama()
    settings = model.generation_config
    settings.bad_words_ids = [[3, 50], [60], [103], [5, 100]]
    settings.force_words_ids = [[[4], [103, 2]], [[4], [50]]]
    settings.sequence_bias = [[[3], 1.0], [[50], 2.0], [[103], -1]]
    done = replace_vocabulary(model, MAP, rows=range(10, 10 + TOKENS))
    new = done.vocabulary.new_ids.tolist()
    assert settings.bad_words_ids == [[new[103]], [new[5], new[100]]]
    assert settings.force_words_ids == [[[new[4]], [new[103], new[2]]]]
    assert settings.sequence_bias == [[[new[3]], 1.0], [[new[103]], -1]]
    assert set(done.cleared) == {"bad_words_ids", "force_words_ids", "sequence_bias"}
    by_tuple = llama()
    by_tuple.generation_config.sequence_bias = {(3, 100): 1.0, (50,): 2.0}
    replace_vocabulary(by_tuple, MAP, rows=range(10, 10 + TOKENS))
    assert by_tuple.generation_config.sequence_bias == {(new[3], new[100]): 1.0}


def test_ids_under_names_of_their_own_are_named_and_other_vocabularies_stay():
    model = llama()
    model.config.boi_id, model.config.special = 103, {"soi_token": 50, "pad_token": 3}
    model.config.image_end_token_id = np.int64(103)
    model.generation_config.max_new_tokens = model.generation_config.num_assistant_tokens = 50  # no ids
    model.other = nn.Module()
    model.other.vocab_size = TEXT + TOKENS
    with pytest.warns(HastenWarning, match=r"^boi_id, special\.soi_token: "):
        done = replace_vocabulary(model, MAP, rows=range(10, 10 + TOKENS))
    assert (model.other.vocab_size, model.config.vocab_size) == (TEXT + TOKENS, done.rows_after)
    assert model.config.image_end_token_id == done.vocabulary.new_ids[103]


def test_generation_bans_what_it_banned_before():
    """Text is banned by its id, which moves behind the clusters."""
    model = llama()
    last = TEXT + TOKENS - 1
    with torch.no_grad():
        model.lm_head.weight[last] = 100 * model.lm_head.weight[last].sign()
    done = replace_vocabulary(model, MAP, rows=range(TOKENS))
    model.generation_config.eos_token_id = None
    moved = int(done.vocabulary.new_ids[last])
    ids = torch.from_numpy(done.vocabulary.renumber([[last, last - 1]]))
    free = model.generate(ids, max_new_tokens=8, do_sample=True, attention_mask=torch.ones_like(ids))
    assert (free[:, 2:] == moved).any()
    again = llama()
    again.generation_config.bad_words_ids = [[last]]
    again.generation_config.eos_token_id = None
    with torch.no_grad():
        again.lm_head.weight[last] = 100 * again.lm_head.weight[last].sign()
    replace_vocabulary(again, MAP, rows=range(TOKENS))
    banned = again.generate(ids, max_new_tokens=8, do_sample=True, attention_mask=torch.ones_like(ids))
    assert not (banned[:, 2:] == moved).any()


def test_adapters_are_merged_before_an_export(tmp_path):
    """save_pretrained would have written the adapter alone."""
    model = llama()
    done = replace_vocabulary(model, MAP, rows=TEXT)
    model.peft_config = {}
    with pytest.raises(ModelError, match="has adapters"):
        export_model(model, MAP, tmp_path / "model", done.vocabulary)
    assert not (tmp_path / "model").exists()


def small(name, **options):
    """A model of another family, converted, as a `CausalModel`."""
    kind, config = getattr(transformers, f"{name}ForCausalLM", None), getattr(transformers, f"{name}Config")
    torch.manual_seed(0)
    kind = kind or getattr(transformers, f"{name}LMHeadModel")
    model = kind(config(vocab_size=TEXT + TOKENS, bos_token_id=1, eos_token_id=2, pad_token_id=0, **options)).eval()
    return HuggingFaceModel(model, replace_vocabulary(model, MAP, rows=TEXT).vocabulary)


FAMILIES = {
    "Mamba": {"hidden_size": 16, "num_hidden_layers": 2},
    "Lfm2": {**BODY, "layer_types": ["conv", "full_attention"]},
    "Bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "Mistral": {**BODY, "sliding_window": 4},
    "GPTNeo": {
        **{"hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32, "window_size": 4},
        **{"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64},
    },
    "Falcon": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "alibi": True},
    "CTRL": {"n_embd": 16, "n_layer": 2, "n_head": 2, "dff": 32, "n_positions": 64},
}
CACHED = {"GPT2", "Lfm2", "Mistral"}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_drawn_is_what_the_forward_predicts_whatever_the_model_remembers(family):
    """Mamba was given a cache of keys and values, and drew each cluster as if it were the first."""
    model = small(family, **FAMILIES[family])
    assert (model.takes_padding, model.takes_cache) == (True, family in CACHED)
    with torch.no_grad():  # else all predictions are much alike
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    condition, without = Condition(torch.tensor([[1, 3, 5], [1, 6, 7]])), Condition(torch.tensor([[2]]))
    likeliest = Sampling(temperature=1e-6, guidance=3.0)
    drawn, _ = sample_clusters(model, condition, 6, likeliest, without=without)
    clusters = torch.empty(2, 0, dtype=torch.long)
    for _ in range(6):
        with_it, without_it = (model(c, clusters).logits[:, -1] for c in (condition, without.expanded(2)))
        best = (without_it + 3 * (with_it - without_it)).argmax(-1)
        clusters = torch.cat([clusters, best[:, None]], 1)
    assert torch.equal(drawn, clusters)


CHANGED = {
    "FalconH1": {
        **{**BODY, "mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4},
        "lm_head_multiplier": 0.1,
    },
    "RecurrentGemma": {**BODY, "lru_width": 16, "attention_window_size": 8},
    "xLSTM": {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4},
    "Cohere": BODY,
    "Granite": {**BODY, "logits_scaling": 8.0},
}


@pytest.mark.parametrize("family", CHANGED)
def test_models_whose_own_logits_are_others_are_refused(family):
    with pytest.raises(AdapterError, match="changes its logits after its head"):
        small(family, **CHANGED[family])


def test_padding_is_refused_where_the_model_would_see_it():
    model = small("Rwkv", hidden_size=16, attention_hidden_size=16, num_hidden_layers=2, intermediate_size=16)
    padded = Condition.padded(torch.tensor([[-1, 1, 5], [1, 6, 7]]))
    with pytest.raises(ConfigError, match="takes no padding"):
        model(padded, torch.empty(2, 0, dtype=torch.long))
    assert sample_clusters(model, Condition(torch.tensor([[1, 6, 7]])), 3)[0].shape == (1, 3)


def test_places_that_the_model_has_no_positions_for_are_refused():
    model = small("GPT2", **FAMILIES["GPT2"])
    condition = Condition(torch.tensor([[1, 3]]))
    assert sample_clusters(model, condition, 63)[0].shape == (1, 63)
    with pytest.raises(ConfigError, match="positions for 64 tokens, condition and image take 65"):
        sample_clusters(model, condition, 64)
    with pytest.raises(ConfigError, match="positions for 64 tokens"):
        model(condition, torch.zeros(1, 63, dtype=torch.long))


def test_clusters_that_there_are_not_would_be_rows_of_text():
    model = llama()
    causal = HuggingFaceModel(model, replace_vocabulary(model, MAP, rows=range(10, 10 + TOKENS)).vocabulary)
    for cluster in (-1, 20):
        with pytest.raises(ConfigError, match=rf"clusters {cluster} \.\. {cluster} are not all in 0 \.\. 19"):
            causal(Condition(torch.tensor([[1]])), torch.tensor([[cluster]]))


def test_models_that_see_what_comes_after_are_refused():
    class Masked(nn.Module):
        @staticmethod
        def can_generate():
            return False

        def get_input_embeddings(self):
            raise NotImplementedError

        get_decoder = get_input_embeddings

    vocabulary = Vocabulary.of_clusters(MAP, 3, "table", "head")
    with pytest.raises(AdapterError, match="sees what comes after"):
        HuggingFaceModel(Masked(), vocabulary)
    with pytest.raises(AdapterError, match="give its forward to a FunctionModel"):
        HuggingFaceModel(nn.Linear(2, 2), vocabulary)


def test_nothing_is_drawn_for_no_condition():
    model = llama()
    causal = HuggingFaceModel(model, replace_vocabulary(model, MAP, rows=TEXT).vocabulary)
    with pytest.raises(ConfigError, match="no condition"):
        sample_clusters(causal, Condition(torch.ones(0, 1, dtype=torch.long)), 3)
    for length in (0, 1.5, None):
        with pytest.raises(ConfigError, match="length must be"):
            sample_clusters(causal, Condition(torch.ones(1, 1, dtype=torch.long)), length)


@pytest.mark.parametrize("seed", [None, "0", 1.5])
def test_seeds_are_whole_numbers(seed):
    with pytest.raises(ConfigError, match="seed must be a whole number"):
        replace_vocabulary(llama(), MAP, rows=TEXT, seed=seed)


def test_one_cluster_and_as_many_as_tokens_are_vocabularies():
    tree = SemanticTree.fit(CODES, normalize="none")
    assert replace_vocabulary(llama(), tree.map(1), rows=np.int64(TEXT), seed=np.int64(3)).rows_after == TEXT + 1
    kept = llama()
    old = kept.lm_head.weight.detach().clone()
    done = replace_vocabulary(kept, tree.map(TOKENS), rows=TEXT, start="mean")
    assert torch.equal(kept.lm_head.weight[done.vocabulary.new_ids], old)
