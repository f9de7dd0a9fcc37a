"""BERT (Devlin et al. 2019, arXiv 1810.04805): norms after each half, token types, learned positions, a head for masked tokens."""

from __future__ import annotations

from stackwise.interop.family import Family, Key, words
from stackwise.interop.table import Row, row
from stackwise.model.block_spec import BlockSpec
from stackwise.model.spec import RackSpec

_LEAVES = ("weight", "bias")


def _ends(spec: RackSpec) -> list[Row]:
    rows = [
        row("bert.embeddings.word_embeddings.weight", "embedding.weight"),
        row("bert.embeddings.position_embeddings.weight", "positions.weight"),
        row("bert.embeddings.token_type_embeddings.weight", "embedding.types"),
        row("cls.predictions.bias", "head.bias"),
    ]
    for leaf in _LEAVES:
        rows += [
            row(f"bert.embeddings.LayerNorm.{leaf}", f"embedding.norm.{leaf}"),
            row(f"cls.predictions.transform.dense.{leaf}", f"head.transform.dense.{leaf}"),
            row(f"cls.predictions.transform.LayerNorm.{leaf}", f"head.transform.norm.{leaf}"),
        ]
    return rows


def _block(spec: BlockSpec) -> list[Row]:
    names = {
        "attention.self.query": "attn.q",
        "attention.self.key": "attn.k",
        "attention.self.value": "attn.v",
        "attention.output.dense": "attn.o",
        "attention.output.LayerNorm": "attn_norm",
        "intermediate.dense": "ffn.up",
        "output.dense": "ffn.down",
        "output.LayerNorm": "ffn_norm",
    }
    return [row(f"{theirs}.{leaf}", f"{ours}.{leaf}") for theirs, ours in names.items() for leaf in _LEAVES]


FAMILY = Family(
    model_type="bert",
    architecture="BertForMaskedLM",
    also=("BertForPreTraining",),
    settings={
        "attention_preset": "bert_style",
        "pos_encoding": "learned",
        "norm": "layernorm",
        "norm_placement": "post",
        "ffn_type": "gelu",
        "bias": True,
        "embedding_norm": "learned",
        "final_norm": False,
        "head_transform": True,
        "head_bias": True,
        "tie_embeddings": True,
    },
    keys=(
        Key("vocab_size", "vocab_size"),
        Key("max_position_embeddings", "max_seq_len", default=512),
        Key("hidden_size", "d_model"),
        Key("intermediate_size", "d_ff"),
        Key("num_hidden_layers", "n_layers"),
        Key("num_attention_heads", "n_heads"),
        Key("layer_norm_eps", "norm_eps", default=1e-12),
        Key("type_vocab_size", "token_types", default=2),
        Key("hidden_dropout_prob", "dropout", default=0.1),
    ),
    fixed={
        "hidden_act": ("gelu",),
        "position_embedding_type": ("absolute",),
        "tie_word_embeddings": (True,),
    },
    ignored=words(
        "attention_probs_dropout_prob classifier_dropout pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers "
        "pooler_size_per_head pooler_type directionality"
    ),
    layer="bert.encoder.layer.{}.",
    ends=_ends,
    block=_block,
    skipped=(r"bert\.pooler\..*", r"cls\.seq_relationship\..*", r"bert\.embeddings\.position_ids"),
    copies=(
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ),
    renamed=(("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")),
)
