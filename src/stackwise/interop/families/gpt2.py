"""GPT-2 (Radford et al. 2019): LayerNorm with biases, learned positions, tanh GELU, matrices stored [in, out]."""

from __future__ import annotations

from stackwise.interop.changes import Chain, Joined, Transposed
from stackwise.interop.family import Family, Key, words
from stackwise.interop.table import Row, row
from stackwise.model.block_spec import BlockSpec
from stackwise.model.spec import RackSpec


def _ends(spec: RackSpec) -> list[Row]:
    rows = [
        row("transformer.wte.weight", "embedding.weight"),
        row("transformer.wpe.weight", "positions.weight"),
        row("transformer.ln_f.weight", "norm.weight"),
        row("transformer.ln_f.bias", "norm.bias"),
    ]
    return rows if spec.tied else [*rows, row("lm_head.weight", "head.weight")]


def _block(spec: BlockSpec) -> list[Row]:
    rows = []
    for theirs, ours in (("ln_1", "attn_norm"), ("ln_2", "ffn_norm")):
        rows += [row(f"{theirs}.{leaf}", f"{ours}.{leaf}") for leaf in ("weight", "bias")]
    for theirs, ours in (("attn.c_proj", "attn.o"), ("mlp.c_fc", "ffn.up"), ("mlp.c_proj", "ffn.down")):
        rows += [
            row(f"{theirs}.weight", f"{ours}.weight", Transposed()),
            row(f"{theirs}.bias", f"{ours}.bias"),
        ]
    parts = Joined((spec.d_model,) * 3)
    for leaf, change in (("weight", Chain((Transposed(), parts))), ("bias", parts)):
        rows.append(row(f"attn.c_attn.{leaf}", tuple(f"attn.{part}.{leaf}" for part in "qkv"), change))
    return rows


FAMILY = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    also=("GPT2Model",),
    settings={
        "attention_preset": "gpt_style",
        "pos_encoding": "learned",
        "norm": "layernorm",
        "ffn_type": "gelu_tanh",
        "bias": True,
    },
    keys=(
        Key("vocab_size", "vocab_size"),
        Key("n_positions", "max_seq_len"),
        Key("n_embd", "d_model"),
        Key("n_layer", "n_layers"),
        Key("n_head", "n_heads"),
        Key("n_inner", "d_ff", default=None),
        Key("layer_norm_epsilon", "norm_eps", default=1e-5),
        Key("resid_pdrop", "dropout", default=0.1),
        Key("tie_word_embeddings", "tie_embeddings", default=True),
    ),
    fixed={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False, True),  # the order of the same operations
    },
    ignored=words(
        "n_ctx attn_pdrop embd_pdrop summary_type summary_use_proj summary_activation summary_proj_to_labels "
        "summary_first_dropout"
    ),
    layer="transformer.h.{}.",
    ends=_ends,
    block=_block,
    skipped=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
    copies=(("lm_head.weight", "transformer.wte.weight"),),
    base="transformer.",
)
