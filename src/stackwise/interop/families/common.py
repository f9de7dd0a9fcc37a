"""What the families around Llama share: names of tensors, and rotary positions in config.json."""

from __future__ import annotations

from typing import Any

from stackwise.config.errors import Problem
from stackwise.interop.changes import Halves
from stackwise.interop.family import Key, Settings
from stackwise.interop.table import Row, row
from stackwise.model.block_spec import BlockSpec
from stackwise.model.rope_scaling import FIELDS_OF
from stackwise.model.spec import RackSpec

_FIELDS = {"original_max_seq_len": "original_max_position_embeddings", "type": "rope_type"}
"""Fields of `model.rope_scaling` that config.json calls otherwise."""

LLAMA_SETTINGS: Settings = {
    "attention_preset": "gpt_style",
    "pos_encoding": "rope",
    "norm": "rmsnorm",
    "ffn_type": "swiglu",
}
LLAMA_KEYS = (
    Key("vocab_size", "vocab_size"),
    Key("max_position_embeddings", "max_seq_len", default=2048),
    Key("hidden_size", "d_model"),
    Key("intermediate_size", "d_ff"),
    Key("num_hidden_layers", "n_layers"),
    Key("num_attention_heads", "n_heads"),
    Key("num_key_value_heads", "n_kv_heads", default=None),
    Key("head_dim", "head_dim", default=None),
    Key("rms_norm_eps", "norm_eps", default=1e-6),
    Key("attention_dropout", "dropout", default=0.0),
    Key("tie_word_embeddings", "tie_embeddings", default=False),
)
TIED = (("lm_head.weight", "model.embed_tokens.weight"),)
ROTARY_BUFFER = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"


def llama_ends(spec: RackSpec) -> list[Row]:
    """Embedding, final norm and head as Llama names them."""
    rows = [row("model.embed_tokens.weight", "embedding.weight"), row("model.norm.weight", "norm.weight")]
    return rows if spec.tied else [*rows, row("lm_head.weight", "head.weight")]


def attention_rows(spec: BlockSpec) -> list[Row]:
    """Grouped attention; queries and keys change the order of their rotary pairs."""
    turn = Halves(spec.head_dim)
    rows = [row("self_attn.o_proj.weight", "attn.o.weight")]
    for leaf in ("weight", "bias") if spec.qkv_bias else ("weight",):
        rows += [row(f"self_attn.{x}_proj.{leaf}", f"attn.{x}.{leaf}", turn) for x in "qk"]
        rows.append(row(f"self_attn.v_proj.{leaf}", f"attn.v.{leaf}"))
    if spec.out_bias:
        rows.append(row("self_attn.o_proj.bias", "attn.o.bias"))
    if spec.qk_norm:
        rows += [row(f"self_attn.{x}_norm.weight", f"attn.{x}_norm.weight", turn) for x in "qk"]
    return rows


def norm_rows() -> list[Row]:
    """A norm before each of the two halves of a layer."""
    return [
        row("input_layernorm.weight", "attn_norm.weight"),
        row("post_attention_layernorm.weight", "ffn_norm.weight"),
    ]


def feed_forward_rows(theirs: str, ours: str, biased: bool = False) -> list[Row]:
    """A gated feed-forward."""
    leaves = ("weight", "bias") if biased else ("weight",)
    return [row(f"{theirs}.{x}_proj.{y}", f"{ours}.{x}.{y}") for x in ("gate", "up", "down") for y in leaves]


def gated_block(spec: BlockSpec) -> list[Row]:
    """A layer of Llama."""
    return [*norm_rows(), *attention_rows(spec), *feed_forward_rows("mlp", "ffn", spec.bias)]


def read_rope(config: dict[str, Any], settings: Settings, problems: list[Problem]) -> None:
    """Base of the rotation and its scaling, from the form of today (rope_parameters) or the older one."""
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    theta = config.get("rope_theta")
    for name, given in (("rope_parameters", new), ("rope_scaling", old)):
        if not isinstance(given, dict | None):
            problems.append(Problem(name, "must be a map or null", given))
            return
    rope = dict(new or old or {})
    if new and old and {**old, "rope_theta": 0} != {**new, "rope_theta": 0}:
        problems.append(Problem("rope_scaling", f"says something else than rope_parameters {new}", old))
        return
    settings["rope_theta"] = rope.pop("rope_theta", theta) or 10_000.0
    older = rope.pop("type", "default")
    kind = rope.pop("rope_type", older)
    if kind == "default":
        return
    spelt = {theirs: ours for ours, theirs in _FIELDS.items()}
    scaling = {spelt.get(name, name): value for name, value in rope.items() if value is not None}
    known = FIELDS_OF.get(kind)
    if known is None:
        problems.append(
            Problem("rope_scaling", "is of no kind that is understood", kind, ", ".join(FIELDS_OF))
        )
        return
    if stray := sorted(str(name) for name in scaling.keys() - set(known)):
        problems.append(Problem(f"rope_scaling.{stray[0]}", f"is not read by {kind}", scaling[stray[0]]))
    settings["rope_scaling"] = {"type": kind, **scaling}
    length, factor = settings.get("max_seq_len"), scaling.get("factor")
    if kind == "dynamic" and isinstance(length, int) and isinstance(factor, int | float):
        # there, the length is that of training
        settings["rope_scaling"] |= {"original_max_seq_len": length}
        settings["max_seq_len"] = round(length * factor)


def write_rope(spec: RackSpec, block: BlockSpec | None = None) -> dict[str, Any]:
    """The older form, which every version of Transformers reads; null: as the first block has it."""
    block = block or spec.blocks[0]
    scaling = block.rope_scaling
    written: dict[str, Any] = {"rope_theta": block.rope_theta, "rope_scaling": None}
    if scaling is None:
        return written
    fields = {name: getattr(scaling, name) for name in FIELDS_OF[scaling.type]}
    if scaling.type in ("linear", "dynamic"):
        del fields["original_max_seq_len"]
    if scaling.type == "dynamic":
        written["max_position_embeddings"] = scaling.original_max_seq_len
    plain = {_FIELDS.get(n, n): list(v) if isinstance(v, tuple) else v for n, v in fields.items()}
    return {**written, "rope_scaling": {name: value for name, value in plain.items() if value is not None}}


def read_biases(config: dict[str, Any], settings: Settings, problems: list[Problem]) -> None:
    """`attention_bias` of all four projections, `mlp_bias` of all three."""
    for name in ("attention_bias", "mlp_bias"):
        if not isinstance(config.get(name, False), bool):
            problems.append(Problem(name, "must be true or false", config.get(name)))
    settings["attention_bias"] = "all" if config.get("attention_bias", False) else "none"
    settings["bias"] = bool(config.get("mlp_bias", False))


def write_biases(spec: RackSpec) -> dict[str, Any]:
    return {"attention_bias": spec.blocks[0].out_bias, "mlp_bias": spec.blocks[0].bias}


FULL, SLIDING = "full_attention", "sliding_attention"


def read_windows(kinds: list[str], width: Any, settings: Settings, problems: list[Problem]) -> None:
    """Layers with a window of `width` tokens among others that see everything, by their kinds."""
    if unknown := sorted(set(kinds) - {FULL, SLIDING}):
        problems.append(Problem("layer_types", "is not understood", unknown[0], f"{FULL}, {SLIDING}"))
        return
    if SLIDING not in kinds:
        return
    settings["sliding_window"] = width
    full = [kind == FULL for kind in kinds]
    if not any(full):
        return
    for every in range(2, len(kinds) + 1):
        for place in range(every):
            if full == [layer % every == place for layer in range(len(kinds))]:
                settings |= {"window_every": every, "full_block": place}
                return
    message = "is no pattern that repeats: of every so many layers one sees everything"
    problems.append(Problem("layer_types", message, kinds))


def layer_types(spec: RackSpec) -> list[str]:
    return [FULL if block.window is None else SLIDING for block in spec.blocks]


def read_sliding_window(config: dict[str, Any], settings: Settings, problems: list[Problem]) -> None:
    """One window for all layers, or none (Mistral)."""
    width = config.get("sliding_window")
    if width is not None:
        settings["sliding_window"] = width


def write_sliding_window(spec: RackSpec) -> dict[str, Any]:
    return {"sliding_window": spec.blocks[0].window}


def read_layer_types(config: dict[str, Any], settings: Settings, problems: list[Problem]) -> None:
    """Layers with a window as Qwen tells them: by `layer_types`, or all behind the first `max_window_layers`."""
    first, kinds = config.get("max_window_layers", 28), config.get("layer_types")
    width, layers = config.get("sliding_window", 4096), settings.get("n_layers")
    windows = config.get("use_sliding_window", False)
    if not windows and set(kinds or ()) - {FULL}:
        problems.append(Problem("layer_types", "needs use_sliding_window, or other layers", kinds, FULL))
    elif windows and isinstance(layers, int):
        kinds = kinds or [FULL if layer < first else SLIDING for layer in range(layers)]
        read_windows(kinds, width, settings, problems)


def write_layer_types(spec: RackSpec) -> dict[str, Any]:
    kinds = layer_types(spec)
    if SLIDING not in kinds:
        return {"use_sliding_window": False}
    width = next(block.window for block in spec.blocks if block.window is not None)
    told = {"use_sliding_window": True, "sliding_window": width, "layer_types": kinds}
    return {**told, "max_window_layers": kinds.index(SLIDING)}
