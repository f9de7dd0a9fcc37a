"""Embedding tables of other models, and layers of one's own in the embedding's place."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from stackwise import (
    ConfigError,
    LexicalKernelManager,
    ProgressiveRackBuilder,
    StackWiseConfig,
    create_rack_from_config,
    create_rack_from_specs,
)
from stackwise.curriculum.split import apply_training
from stackwise.model.pretrained import find_table
from stackwise.model.rack import Rack
from stackwise.model.spec import RackSpec
from stackwise.objectives.causal import CausalLM
from stackwise.storage.errors import UnsafeInputError
from stackwise.training.run import train
from stackwise.training.stored import open_run

V, E, D = 97, 48, 32


@pytest.fixture
def folder(tmp_path):
    """A model folder of two files, of which only the one with the table is readable."""
    path = tmp_path / "model"
    path.mkdir()
    tables = {
        "embed_tokens": torch.randn(V, E).to(torch.bfloat16),
        "lm_head": torch.randn(V, E).to(torch.bfloat16),
    }
    save_file({"model.embed_tokens.weight": tables["embed_tokens"]}, path / "a.safetensors")
    save_file({"lm_head.weight": tables["lm_head"]}, path / "b.safetensors")
    index = {
        "model.embed_tokens.weight": "a.safetensors",
        "lm_head.weight": "b.safetensors",
        "model.x": "c.safetensors",
    }
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (path / "c.safetensors").write_bytes(b"no tensors")
    (path / "config.json").write_text(json.dumps({"hidden_size": E, "tie_word_embeddings": False}))
    return path, tables


def config_of(path, vocab=V, **model):
    keys = {"family": str(path), **model.pop("tokenizer_embedding", {})}
    return {
        "model": {
            "d_model": D,
            "n_heads": 2,
            "vocab_size": vocab,
            "max_seq_len": 32,
            "architecture": {"n_stacks": 2, "blocks_per_stack": 1},
            "tokenizer_embedding": keys,
            **model,
        },
        "training": {"progressive": {"enabled": False}, "seq_len": 16},
    }


@pytest.mark.parametrize("option", ["embed_tokens", "lm_head"])
def test_the_table_is_that_of_the_folder(folder, option):
    path, tables = folder
    rack = create_rack_from_config(config_of(path, tokenizer_embedding={"embedding_option": option}))
    assert torch.equal(rack.embedding.weight, tables[option].float())
    ids = torch.randint(0, V, (2, 5))
    assert rack(ids).shape == (2, 5, V)
    expected = tables[option].float()[ids] @ rack.embedding.adapter.weight.T
    torch.testing.assert_close(rack.embedding(ids), expected)


def test_frozen_tables_stay_and_what_is_around_them_trains(folder):
    path, _ = folder
    for options, trains in (({}, False), ({"freeze_embeddings": False, "adapter_hidden_dim": 12}, True)):
        rack = create_rack_from_config(config_of(path, tie_embeddings=True, tokenizer_embedding=options))
        apply_training(rack, {"embedding", "stack:s0", "stack:s1", "norm", "head"})
        rack.embedding.requires_grad_(True)
        assert rack.embedding.weight.requires_grad is trains
        ids = torch.randint(0, V, (2, 6))
        CausalLM().loss(rack.forward_features(ids), rack.head, CausalLM().corrupt({"input_ids": ids}))[
            0
        ].backward()
        without = [n for n, p in rack.named_parameters() if p.grad is None]
        assert without == ([] if trains else ["embedding.weight"])


def test_tokens_that_the_table_lacks_start_at_its_mean_and_train(folder):
    path, tables = folder
    for freeze in (True, False):
        data = config_of(path, V + 1, tie_embeddings=True, tokenizer_embedding={"freeze_embeddings": freeze})
        data["model"]["attention_preset"] = "bert_style"
        data["training"]["progressive"]["training_objective"] = "mlm"
        data["objective"] = {"mask_token_id": V}
        rack = create_rack_from_config(data)
        table = rack.embedding.matrix
        assert torch.equal(table[:V], tables["embed_tokens"].float())
        torch.testing.assert_close(table[V], tables["embed_tokens"].float().mean(0))
        assert [n for n, _ in rack.named_parameters() if n.startswith("embedding.")] == (
            ["embedding.weight", "embedding.extra", "embedding.adapter.weight"]
            if freeze
            else ["embedding.weight", "embedding.adapter.weight"]
        )
        ids = torch.tensor([[3, V, 5, V]])
        torch.testing.assert_close(rack.embedding.rows(ids), table[ids])
        expected = rack.head.inner(torch.ones(1, D)) @ table.T
        torch.testing.assert_close(rack.head(torch.ones(1, D)), expected)
        F.cross_entropy(rack(ids).flatten(0, 1), ids.flatten()).backward()
        if freeze:
            assert rack.embedding.extra.grad.abs().sum() > 0
            assert rack.embedding.weight.grad is None


@pytest.mark.parametrize("tied", [True, False])
def test_frozen_rows_compute_as_a_whole_table_does(tied):
    whole = create_rack_from_specs(V, D, BLOCKS, tied, embedding_layer=nn.Embedding(V, E)).double()
    parts = Rack(replace(whole.spec, frozen_rows=90)).double()
    values = whole.state_dict()
    table = values.pop("embedding.weight")
    parts.load_state_dict({**values, "embedding.weight": table[:90], "embedding.extra": table[90:]})
    assert RackSpec.from_dict(parts.spec.to_dict()) == parts.spec
    ids = torch.randint(0, V, (4, 12))
    losses = []
    for rack in (whole, parts):
        example = CausalLM().corrupt({"input_ids": ids})
        losses.append(CausalLM().loss(rack.forward_features(ids), rack.head, example)[0])
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(parts.embedding.extra.grad, whole.embedding.weight.grad[90:])
    torch.testing.assert_close(rack.norm.weight.grad, whole.norm.weight.grad)


def test_a_run_starts_from_the_table_and_keeps_it(folder, tiny, tmp_path):
    path, tables = folder
    text = tmp_path / "letters.txt"
    text.write_text("".join(map(chr, range(200, 200 + V))) * 20)
    keys = {
        "data.path": str(text),
        "model.tokenizer_embedding.family": str(path),
        "model.tie_embeddings": True,
    }
    config = tiny(**{key.replace(".", "__"): value for key, value in keys.items()}, training__max_steps=2)
    train(config, sinks=[])
    rack = open_run(tmp_path / "runs" / "tiny").rack
    assert torch.equal(rack.embedding.weight, tables["embed_tokens"].float())
    start = ProgressiveRackBuilder(config=StackWiseConfig.from_dict(config_of(path)))
    start.append_stack()
    assert torch.equal(start.build_rack().embedding.weight, rack.embedding.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab": V - 1}, f"has {V} tokens, got {V - 1}"),
        ({"vocab": V + 1}, f"has {V} tokens, got {V + 1}"),
        ({"embedding_width": 40}, "which is 48, got 40"),
    ],
)
def test_tables_that_do_not_fit_are_refused_with_both_sizes(folder, change, message):
    with pytest.raises(ConfigError, match=message):
        create_rack_from_config(config_of(folder[0], **change))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bertt", "gpt2, bert, modernbert.*did you mean 'bert'.*path of a model folder"),
        ("no/such-model", "is no folder here.*path of a model folder"),
    ],
)
def test_an_unknown_family_names_the_ways_out(name, message):
    with pytest.raises(ConfigError, match=message):
        find_table(name)


def test_damaged_folders_are_refused(folder, tmp_path):
    path, _ = folder
    (path / "b.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(ConfigError, match="cannot be read"):
        find_table(str(path), "lm_head")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match=r"no file 'config\.json'"):
        find_table(str(empty))
    (empty / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no weights"):
        find_table(str(empty))
    save_file({"other.weight": torch.ones(2, 2), "emb.bias": torch.ones(2)}, empty / "model.safetensors")
    with pytest.raises(ConfigError, match=r"what comes near: emb\.bias"):
        find_table(str(empty))
    with pytest.raises(ConfigError, match="did you mean 'lm_head'"):
        find_table(str(empty), "lm-head")
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"wte.weight": "../empty/model.safetensors"}})
    )
    with pytest.raises(UnsafeInputError, match="no file of the folder"):
        find_table(str(path))
    (empty / "model.safetensors").rename(empty / "pytorch_model.bin")
    with pytest.raises(UnsafeInputError, match="a pickle"):
        find_table(str(empty))


def test_lexical_kernels_are_cosines(folder):
    path, tables = folder
    layer = LexicalKernelManager(str(path), target_model_dim=D)
    ids = torch.randint(0, V, (2, 5))
    rows = tables["embed_tokens"].float()[ids]
    expected = torch.stack([F.cosine_similarity(rows[:, i : i + 1], rows, dim=-1) for i in range(5)], 1)
    torch.testing.assert_close(layer.lexical_kernel(ids), expected)
    assert layer(ids).shape == (2, 5, D)
    assert torch.equal(layer.tie_weight(), layer.get_lm_head().matrix)
    assert layer.get_lm_head()(torch.randn(3, D)).shape == (3, V)
    assert not layer.get_embeddings().weight.requires_grad
    assert LexicalKernelManager(str(path), freeze_embeddings=False).get_embeddings().weight.requires_grad
    with pytest.raises(ValueError, match="target_model_dim"):
        LexicalKernelManager(str(path), target_model_dim=0)


BLOCKS = [{"stack_id": 0, "n_blocks": 1, "block_spec": {"n_heads": 2, "d_ff": 16, "causal": True}}]


@pytest.mark.parametrize("tied", [True, False])
def test_tables_and_modules_of_ones_own_serve_as_embedding(folder, tied):
    ids = torch.randint(0, V, (2, 5))
    own = LexicalKernelManager(str(folder[0]), target_model_dim=D)
    for layer, table in ((nn.Embedding(V, E), None), (own, own.tie_weight())):
        rack = create_rack_from_specs(V, D, BLOCKS, tied, embedding_layer=layer)
        assert rack(ids).shape == (2, 5, V)
        if tied:
            assert rack.head.matrix is (layer.weight if table is None else own.get_embeddings().weight)
        context = rack.make_context(ids)
        seen = rack.embed(ids, context)
        torch.testing.assert_close(seen, rack.embedding(ids) if table is None else own(ids))
        rack.generate(ids, max_new_tokens=2)


def test_layers_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="which has 90 tokens, got 97"):
        create_rack_from_specs(V, D, BLOCKS, embedding_layer=nn.Embedding(90, D))
    with pytest.raises(TypeError, match="lacks vocab_size, embedding_dim, tie_weight"):
        create_rack_from_specs(V, D, BLOCKS, embedding_layer=nn.Linear(3, D))

    class Own(nn.Module):
        vocab_size, embedding_dim = V, E

        def __init__(self, width=D):
            super().__init__()
            self.inner = nn.Embedding(V, width)

        def tie_weight(self):
            return None

        def forward(self, ids):
            return self.inner(ids)

    with pytest.raises(ValueError, match=r"cannot be tied.*tie_embeddings=False"):
        create_rack_from_specs(V, D, BLOCKS, embedding_layer=Own())
    with pytest.raises(ValueError, match="vectors of 8, and the rack is 32"):
        create_rack_from_specs(V, D, BLOCKS, False, embedding_layer=Own(8))
    assert create_rack_from_specs(V, D, BLOCKS, False, embedding_layer=Own())(
        torch.zeros(1, 2).long()
    ).shape == (1, 2, V)
