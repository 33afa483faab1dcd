"""What replacing rows would lose or leave behind, silently: refused by name, or carried over."""

import copy

import numpy as np
import pytest
import tiny_tokens
import torch
from tiny_tokens import CODES, MAP, TEXT, TOKENS, llama
from torch import nn

from hasten.errors import AdapterError, ConfigError, ModelError
from hasten.tokens import SemanticTree, flat_map, replace_vocabulary
from hasten.tokens.export import export_model, open_model


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
        (alias, r"second of .* shares the weight of model\.embed_tokens"),
        (shared, r"draft of .* shares the weight of lm_head"),
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
