"""ModernBERT (Warner et al. 2024, arXiv 2412.13663): BERT with rotary positions, windows and gated feed-forwards."""

from __future__ import annotations

from typing import Any

from stackwise.config.errors import Problem
from stackwise.interop.changes import Chain, Each, Halves, Joined, Same
from stackwise.interop.families.common import FULL, SLIDING, layer_types, read_windows
from stackwise.interop.family import Family, Key, Settings, words
from stackwise.interop.table import Row, row
from stackwise.model.block_spec import BlockSpec
from stackwise.model.spec import RackSpec


def _ends(spec: RackSpec) -> list[Row]:
    rows = [
        row("model.embeddings.tok_embeddings.weight", "embedding.weight"),
        row("model.embeddings.norm.weight", "embedding.norm.weight"),
        row("model.final_norm.weight", "norm.weight"),
        row("head.dense.weight", "head.transform.dense.weight"),
        row("head.norm.weight", "head.transform.norm.weight"),
        row("decoder.bias", "head.bias"),
    ]
    return rows if spec.tied else [*rows, row("decoder.weight", "head.weight")]


def _block(spec: BlockSpec) -> list[Row]:
    turn = Halves(spec.head_dim)
    heads = Chain((Joined((spec.d_model,) * 3), Each((turn, turn, Same()))))
    rows = [
        row("attn.Wqkv.weight", tuple(f"attn.{part}.weight" for part in "qkv"), heads),
        row("attn.Wo.weight", "attn.o.weight"),
        row("mlp_norm.weight", "ffn_norm.weight"),
        row("mlp.Wi.weight", ("ffn.gate.weight", "ffn.up.weight"), Joined((spec.d_ff,) * 2)),
        row("mlp.Wo.weight", "ffn.down.weight"),
    ]
    return [*rows, row("attn_norm.weight", "attn_norm.weight")] if spec.attn_input_norm else rows


def _read(config: dict[str, Any], settings: Settings, problems: list[Problem]) -> None:
    """Windows and both rotations, in the form of today or the older one."""
    layers, every = settings.get("n_layers"), config.get("global_attn_every_n_layers", 3)
    kinds, width = config.get("layer_types"), config.get("local_attention", 128)
    far, near = config.get("global_rope_theta", 160_000.0), config.get("local_rope_theta", 10_000.0)
    rope = config.get("rope_parameters") or {}
    if not isinstance(rope, dict) or not all(isinstance(part, dict) for part in rope.values()):
        problems.append(Problem("rope_parameters", "must be a map of maps or null", rope))
        return
    for name in (FULL, SLIDING):
        given = dict(rope.get(name, {}))
        theta, kind = given.pop("rope_theta", None), given.pop("rope_type", "default")
        if kind != "default" or given:
            problems.append(Problem(f"rope_parameters.{name}", "is not understood", rope[name]))
        if theta is not None:
            far, near = (theta, near) if name == FULL else (far, theta)
    settings |= {"rope_theta": far, "local_rope_theta": near}
    if not isinstance(width, int) or width % 2:
        problems.append(Problem("local_attention", "must be even, half to each side", width))
    elif isinstance(layers, int):
        kinds = kinds or [SLIDING if layer % every else FULL for layer in range(layers)]
        read_windows(kinds, width // 2 + 1, settings, problems)
        if SLIDING not in kinds:
            del settings["local_rope_theta"]


def _write(spec: RackSpec) -> dict[str, Any]:
    kinds = layer_types(spec)
    thetas = {kind: block.rope_theta for kind, block in zip(kinds, spec.blocks, strict=True)}
    every = next((i for i, kind in enumerate(kinds) if i and kind == FULL), len(kinds))
    written: dict[str, Any] = {"layer_types": kinds, "global_attn_every_n_layers": every}
    for kind, name in ((FULL, "global_rope_theta"), (SLIDING, "local_rope_theta")):
        if kind in thetas:
            written[name] = thetas[kind]
    window = next((block.window for block in spec.blocks if block.window is not None), None)
    return written if window is None else {**written, "local_attention": 2 * (window - 1)}


FAMILY = Family(
    model_type="modernbert",
    architecture="ModernBertForMaskedLM",
    settings={
        "attention_preset": "bert_style",
        "pos_encoding": "rope",
        "norm": "layernorm",
        "ffn_type": "geglu",
        "bias": False,
        "first_norm": False,
        "embedding_norm": "learned",
        "head_transform": True,
        "head_bias": True,
    },
    keys=(
        Key("vocab_size", "vocab_size"),
        Key("max_position_embeddings", "max_seq_len", default=8192),
        Key("hidden_size", "d_model"),
        Key("intermediate_size", "d_ff"),
        Key("num_hidden_layers", "n_layers"),
        Key("num_attention_heads", "n_heads"),
        Key("norm_eps", "norm_eps", default=1e-5),
        Key("mlp_dropout", "dropout", default=0.0),
        Key("tie_word_embeddings", "tie_embeddings", default=True),
    ),
    fixed={
        "hidden_activation": ("gelu",),
        "classifier_activation": ("gelu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "norm_bias": (False,),
        "classifier_bias": (False,),
        "decoder_bias": (True,),
    },
    ignored=words(
        "attention_dropout embedding_dropout classifier_dropout classifier_pooling deterministic_flash_attn "
        "initializer_cutoff_factor sparse_prediction sparse_pred_ignore_index reference_compile repad_logits_with_grad "
        "layer_norm_eps position_embedding_type"
    ),
    read=_read,
    write=_write,
    layer="model.layers.{}.",
    ends=_ends,
    block=_block,
    copies=(("decoder.weight", "model.embeddings.tok_embeddings.weight"),),
)
