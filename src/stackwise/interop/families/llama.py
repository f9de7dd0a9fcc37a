"""Llama 1 to 3 (Touvron et al. 2023, arXiv 2302.13971; arXiv 2407.21783): RMSNorm, SwiGLU, rotary, grouped heads."""

from __future__ import annotations

from stackwise.interop.families.common import ROPE_KEYS, gated_block, llama_ends, read_rope, write_rope
from stackwise.interop.family import Family, Key

FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    settings={
        "attention_preset": "gpt_style",
        "pos_encoding": "rope",
        "norm": "rmsnorm",
        "ffn_type": "swiglu",
        "bias": False,
    },
    keys=(
        Key("vocab_size", "vocab_size"),
        Key("max_position_embeddings", "max_seq_len", default=2048),
        Key("hidden_size", "d_model"),
        Key("intermediate_size", "d_ff"),
        Key("num_hidden_layers", "n_layers"),
        Key("num_attention_heads", "n_heads"),
        Key("num_key_value_heads", "n_kv_heads", default=None),
        Key("rms_norm_eps", "norm_eps", default=1e-6),
        Key("attention_dropout", "dropout", default=0.0),
        Key("tie_word_embeddings", "tie_embeddings", default=False),
    ),
    fixed={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "pretraining_tp": (1, 2, 4, 8),  # how many parts a product was computed in
    },
    ignored=ROPE_KEYS,
    read=read_rope,
    write=write_rope,
    layer="model.layers.{}.",
    ends=llama_ends,
    block=gated_block,
    skipped=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    base="model.",
)
