"""Settings of the model: shape, attention, positions, feed-forward, norms and embeddings."""

from typing import Annotated, Any, Literal, Self

from annotated_types import Ge, MinLen
from pydantic import Field, model_validator

from stackwise.config.base import Settings
from stackwise.config.types import (
    BelowOne,
    Depth,
    Flag,
    Int,
    NonNegativeInt,
    OneOf,
    PathText,
    PositiveFloat,
    PositiveInt,
    UnitFloat,
)
from stackwise.model.attention_settings import AttentionFields, Preset, attention_fields
from stackwise.model.moe_settings import MoeSettings
from stackwise.model.position_settings import RopeScalingSettings
from stackwise.model.rope_scaling import RopeScaling

# The names a key accepts. They are open: `model/` adds a name here when a part is registered.
NORMS = ["rmsnorm", "rmsnorm_offset", "layernorm"]
POSITIONS = ["rope", "learned", "sinusoidal", "alibi", "none"]
FFN_TYPES = {
    "swiglu": True,
    "geglu": True,
    "geglu_tanh": True,
    "gelu": False,
    "gelu_tanh": False,
    "silu": False,
    "relu": False,
    "relu2": False,
}
"""Feed-forward name -> whether it is gated, which decides the default `d_ff`."""


class ArchitectureConfig(Settings):
    """How many stacks, and how many blocks each."""

    n_stacks: Depth = 2
    """Stacks of the finished model; the progressive run grows to this many unless `target_stacks` says otherwise."""
    blocks_per_stack: Depth = 4
    """Blocks (transformer layers) per stack."""

    @property
    def total_blocks(self) -> int:
        """Blocks of the finished model: n_stacks * blocks_per_stack."""
        return self.n_stacks * self.blocks_per_stack


class StackShape(Settings):
    """How one stack differs from the others."""

    n_blocks: Depth | None = None
    """Blocks of the stack. null: `model.architecture.blocks_per_stack`."""
    n_heads: PositiveInt | None = None
    """Query heads. null: `model.n_heads`."""
    n_kv_heads: PositiveInt | None = None
    """Key and value heads. null: `model.n_kv_heads`."""
    d_ff: PositiveInt | None = None
    """Width of the feed-forward. null: `model.d_ff`."""
    ffn_type: Annotated[str, OneOf(FFN_TYPES)] | None = None
    """Feed-forward. null: `model.ffn_type`."""
    attention_preset: Preset | None = None
    """Named attention. null: `model.attention_preset`."""
    attention_overrides: AttentionFields = Field(default_factory=AttentionFields)
    """Single fields changed in the attention of the stack."""
    dropout: BelowOne | None = None
    """Dropout of its blocks. null: `model.dropout`."""
    windowed: Flag = True
    """false: its blocks see everything in spite of `model.sliding_window`."""
    experts: Flag = True
    """false: its feed-forwards are dense in spite of `model.moe`."""

    def applied_to(self, model: "ModelSettings") -> "ModelSettings":
        """The model as the blocks of this stack see it."""
        own: dict[str, Any] = {
            name: value
            for name in ("n_heads", "n_kv_heads", "d_ff", "ffn_type", "attention_preset", "dropout")
            if (value := getattr(self, name)) is not None
        }
        own.setdefault("d_ff", model.ffn_width)
        if not self.windowed:
            own["sliding_window"] = None
        if not self.experts:
            own["moe"] = model.moe.model_copy(update={"n_experts": 0})
        if {"n_heads", "attention_preset"} & own.keys():
            own.setdefault("n_kv_heads", None)  # that of the model was chosen for other attention
        overrides = {
            **model.attention_overrides.model_dump(exclude_none=True),
            **self.attention_overrides.model_dump(exclude_none=True),
        }
        return model.model_copy(update={**own, "attention_overrides": AttentionFields(**overrides)})


class TokenizerEmbedding(Settings):
    """The embedding's table: a fresh one, or that of a pretrained model."""

    family: PathText | None = None
    """Pretrained model whose table is taken: the folder of a model, an id of the Hugging Face hub, or gpt2, bert, modernbert, llama3, qwen3, mistral, gemma3. null: a fresh table, nothing is fetched."""
    embedding_option: Literal["embed_tokens", "lm_head"] = "embed_tokens"
    """Which of its tables: that of its embedding or of its head."""
    freeze_embeddings: Flag = True
    """Keep the pretrained rows as they are; rows of tokens it lacks, such as the mask token, train."""
    adapter_hidden_dim: PositiveInt | None = None
    """Width between two linears with a GELU that bring the table to `d_model`. null: one linear, where the widths differ."""


class ModelSettings(Settings):
    """The finished model."""

    d_model: PositiveInt = 768
    """Width of the residual stream."""
    n_heads: PositiveInt = 12
    """Query heads; must divide `d_model` unless `head_dim` is set."""
    head_dim: PositiveInt | None = None
    """Numbers per head of queries, keys and values. null: `d_model` / `n_heads`."""
    n_kv_heads: PositiveInt | None = None
    """Key and value heads, a divisor of `n_heads`: 1 is multi-query, fewer than `n_heads` grouped-query. null: the preset's choice."""
    d_ff: PositiveInt | None = None
    """Width of the feed-forward. null: 8/3 of `d_model` rounded to a multiple of 64 when gated, else 4 times `d_model`."""
    vocab_size: Annotated[Int, Ge(2)] | None = None
    """Tokens in the vocabulary. null: the tokenizer's size."""
    max_seq_len: PositiveInt = 2048
    """Longest row of tokens, and the trained length of rotary positions unless `rope_scaling` names another."""
    architecture: ArchitectureConfig = Field(default_factory=ArchitectureConfig)
    """Shape of the stack of blocks."""
    stacks: Annotated[list[StackShape], MinLen(1)] | None = None
    """Stacks that differ, one entry per stack from the embedding to the head. null: all alike."""
    attention_preset: Preset = "gpt_style"
    """Named attention: bert_style sees all positions, gpt_style only earlier ones, efficient_gqa all with a quarter of the key and value heads; mla_attention caches one latent for all heads; kernel_attention compares by a gaussian kernel; mlgka is mla with a quarter of the heads and a laplacian kernel; custom takes `attention_custom`."""
    attention_custom: AttentionFields | None = None
    """All fields of the attention, for the preset custom; a field left out is that of bert_style, `model.qk_norm`."""
    attention_overrides: AttentionFields = Field(default_factory=AttentionFields)
    """Single fields changed in the chosen preset."""
    qk_norm: Flag = False
    """Normalise queries and keys per head before their product, which keeps large learning rates stable."""
    score_width: PositiveFloat | None = None
    """Attention scores are divided by the square root of this number (`query_pre_attn_scalar` of Gemma). null: the width of a head."""
    attention_softcap: PositiveFloat | None = None
    """Bend attention scores into c tanh(score / c), so that none passes c; all scores are then held in memory. null: no bound."""
    sliding_window: PositiveInt | None = None
    """Tokens see those less than this many positions away, themselves included, and the cache holds no more. null: no window."""
    window_every: PositiveInt = 1
    """Of every so many blocks one sees everything in spite of `sliding_window`; 1: none does."""
    full_block: NonNegativeInt | None = None
    """Which of every `window_every` blocks that is, from 0. null: the last (as Gemma 3; ModernBERT has the first)."""
    attention_sinks: NonNegativeInt = 0
    """First tokens of a text that stay visible beside the window."""
    parallel_layers: Flag = False
    """Let attention and feed-forward read the same normalised input, side by side."""
    first_norm: Flag = True
    """Normalise what the attention of the first block reads; false where the embedding is normalised already (ModernBERT)."""
    norm: Annotated[str, OneOf(NORMS)] = "rmsnorm"
    """Normalisation of the residual stream; rmsnorm_offset multiplies by 1 + weight (Gemma), also in the norms of heads and latents."""
    norm_placement: Literal["pre", "post", "both"] = "pre"
    """Normalise the input of each sub-layer (pre), the sum after it (post), or its input and its output (both)."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the variance inside the norms."""
    ffn_type: Annotated[str, OneOf(FFN_TYPES)] = "swiglu"
    """Feed-forward: gated (swiglu, geglu, geglu_tanh) or an activation between two linears."""
    moe: MoeSettings = Field(default_factory=MoeSettings)
    """Mixtures of experts in the place of feed-forwards."""
    bias: Flag = False
    """Give every linear of the blocks a bias, and layernorm a shift."""
    attention_bias: Literal["none", "qkv", "all"] | None = None
    """Which linears of the attention have a bias: qkv are those to queries, keys and values. null: all or none, as `bias` says."""
    freeze_up_proj: Flag = False
    """Keep the up projections of gated feed-forwards at their random start: never trained, never decayed."""
    dropout: BelowOne = 0.0
    """Probability of zeroing attention weights and sub-layer outputs in training."""
    pos_encoding: Annotated[str, OneOf(POSITIONS)] | None = None
    """How positions enter; alibi makes distant tokens less likely and knows no longest row. null: rope if `use_rope`, else learned."""
    use_rope: Flag = True
    """Rotary positions; short for `pos_encoding: rope`, and follows `pos_encoding` where only that is set."""
    rope_theta: PositiveFloat = 1e4
    """Base of the rotation angles; larger for longer contexts."""
    local_rope_theta: PositiveFloat | None = None
    """Base of the rotation angles in blocks with a window, which are then never scaled. null: `rope_theta`, scaled alike."""
    rope_scaling: RopeScalingSettings | None = None
    """Stretches rotary positions to rows longer than those of training; `max_seq_len` is then the length to reach."""
    embedding_norm: Flag | Literal["learned"] = False
    """true brings every embedded token to unit rms, without a weight of its own, before positions are added; learned puts `model.norm` with weights behind the sum of token, position and type, as BERT and ModernBERT do."""
    embedding_scale: PositiveFloat = 1.0
    """Factor on every embedded token; Gemma multiplies by the square root of `d_model`."""
    token_types: NonNegativeInt = 0
    """Kinds of sentences with a trained vector each, added to the embedding; 2 tells the sentences of a pair apart. 0: none."""
    embedding_width: PositiveInt | None = None
    """Width of the embedding's table; an adapter brings it to `d_model`, and, tied, the head back to it. null: `d_model`."""
    tokenizer_embedding: TokenizerEmbedding = Field(default_factory=TokenizerEmbedding)
    """Where the embedding's table comes from, and what brings it to `d_model`."""
    tie_adapter: Literal["linear", "transpose"] = "linear"
    """What brings the hidden state to a tied table of another width: a linear of its own, or the embedding's adapter transposed."""
    head_rank: PositiveInt | None = None
    """Rank of an untied head's matrix, which is then a product of two. null: full."""
    head_transform: Flag = False
    """Put a dense layer, GELU and `model.norm` in front of the head, as BERT does for masked tokens."""
    head_bias: Flag = False
    """Give every token of the vocabulary a trained bias in the logits."""
    logit_softcap: PositiveFloat | None = None
    """Bend logits into c tanh(logits / c), so that none passes c. null: no bound."""
    final_norm: Flag = True
    """Normalise what the last block gives; BERT, whose blocks end with a norm, does not."""
    tie_embeddings: Flag | None = None
    """Use the embedding matrix as the head. null: false under an enabled append curriculum, so that the head can train at every stage, else true."""
    residual_gain: UnitFloat | None = None
    """Factor on what each sub-layer adds to the residual stream. null: no factor."""
    spectral_norm: Flag = False
    """Divide every matrix of a stack by its largest singular value while the stack trains, which bounds what a block can change; folded into plain weights where it freezes and at the end of the run."""
    short_conv: NonNegativeInt = 0
    """Tokens covered by a depthwise convolution on the input of attention and feed-forward, 0 or 2 and more; 0 is off. It looks back under causal attention, else both ways, and its width is then odd. A few parameters that pay well on character and byte models."""
    zero_init_outputs: Flag = False
    """Start the output projections of attention and feed-forward at zero, so that every block starts as the identity; the head, too, when it is not tied."""

    @model_validator(mode="after")
    def _unset_keys_follow(self) -> Self:
        # A key nobody set must not contradict one that somebody did, else a saved configuration,
        # where every key is written, could not be read back.
        if "use_rope" not in self.model_fields_set:
            self.__dict__["use_rope"] = self.pos_encoding in (None, "rope")
        if self.stacks is not None and "n_stacks" not in self.architecture.model_fields_set:
            self.architecture.__dict__["n_stacks"] = len(self.stacks)
        return self

    @property
    def positions(self) -> str:
        """The position encoding: `pos_encoding`, or what `use_rope` stands for."""
        return self.pos_encoding or ("rope" if self.use_rope else "learned")

    @property
    def ffn_is_gated(self) -> bool:
        """Whether the feed-forward has a gate beside its up projection."""
        return FFN_TYPES[self.ffn_type]

    @property
    def ffn_width(self) -> int:
        """`d_ff`, or its default."""
        return self.d_ff if self.d_ff is not None else default_d_ff(self.d_model, self.ffn_type)

    def sees_window(self, layer: int | None) -> bool:
        """Whether the block at this place from the embedding has the window; null: one that has."""
        if self.sliding_window is None:
            return False
        every = self.window_every
        return (
            layer is None
            or every == 1
            or layer % every != (every - 1 if self.full_block is None else self.full_block)
        )

    @property
    def scaled_rope(self) -> RopeScaling | None:
        """`rope_scaling` with factor and trained length filled in; wrong fields are ValueErrors."""
        keys = self.rope_scaling
        if keys is None:
            return None
        factor, trained = keys.factor, keys.original_max_seq_len
        if factor is None:
            factor = self.max_seq_len / trained if trained else 1.0
        trained = trained or round(self.max_seq_len / factor)
        return RopeScaling(**{**keys.model_dump(), "factor": factor, "original_max_seq_len": trained})

    @property
    def attention(self) -> dict[str, Any]:
        """What preset, `attention_custom` and `attention_overrides` come to; see `attention_fields`."""
        return attention_fields(self)


def default_d_ff(d_model: int, ffn_type: str) -> int:
    """8/3 of the width to the nearest multiple of 64 for gated feed-forwards, which have three matrices, else 4 times it."""
    return max(64, round(d_model * 8 / 3 / 64) * 64) if FFN_TYPES[ffn_type] else 4 * d_model
