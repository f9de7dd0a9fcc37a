"""Tiny random models of Transformers in folders, as somebody else would have saved them."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stackwise.data.tokenizers import train_bpe

VOCAB = 320


def quiet_transformers() -> Any:
    """The package, quietly; without it the test is skipped."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip(
            "transformers is not installed: it is what these tests compare with (pip install stackwise[hf])"
        )
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import transformers as package

            package.logging.set_verbosity_error()
            package.utils.logging.disable_progress_bar()
    finally:
        logging.disable(before)
    return package


LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
GEMMA = {**LLAMA, "head_dim": 16, **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)}
DEEPSEEK = {
    **LLAMA,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCAB,
            "n_positions": 128,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", LLAMA),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", LLAMA),
    "bert": (
        "BertConfig",
        "BertForMaskedLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        },
    ),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**LLAMA, "sliding_window": 6}),
    "modernbert": (
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "local_attention": 8,
            **dict.fromkeys(
                ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0
            ),
        },
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "deepseek_v2": ("DeepseekV2Config", "DeepseekV2ForCausalLM", {**DEEPSEEK, "q_lora_rank": None}),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {**DEEPSEEK, "q_lora_rank": 16, "n_group": 2, "topk_group": 1},
    ),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", GEMMA),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**GEMMA, "sliding_window": 6, "query_pre_attn_scalar": 12},
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            **GEMMA,
            "num_hidden_layers": 5,
            "sliding_window": 6,
            "sliding_window_pattern": 3,
            "query_pre_attn_scalar": 12,
        },
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**LLAMA, "head_dim": 16}),
}
"""Name -> config class, model class, arguments."""


def make_model(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A random model of Transformers, in eval mode; its biases and norms are random too."""
    package = quiet_transformers()
    config, model, options = KINDS[kind]
    torch.manual_seed(seed)
    made = getattr(package, model)(getattr(package, config)(**{**options, **changes})).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            else:
                parameter.mul_(4)  # attention that is sharp enough to show a wrong rotation
    return made


@pytest.fixture(scope="session")
def transformers() -> Any:
    """The package."""
    return quiet_transformers()


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json of at most VOCAB ids."""
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    return train_bpe(["to be or not to be, that is the question " * 20], 300).save(path)


@pytest.fixture
def saved(tmp_path: Path, words: Path) -> Callable[..., tuple[Any, Path]]:
    """Make a model and save it with its tokenizer; returns the model and the folder."""

    def make(
        kind: str, *, dtype: torch.dtype | None = None, shard: str | None = None, **changes: Any
    ) -> tuple[Any, Path]:
        model = make_model(kind, **changes)
        if dtype is not None:
            model = model.to(dtype)
        folder = tmp_path / f"hf-{kind}"
        model.save_pretrained(folder, **({} if shard is None else {"max_shard_size": shard}))
        (folder / "tokenizer.json").write_bytes(words.read_bytes())
        return model, folder

    return make
