"""CPU time of a training step of every family that can be imported, against Transformers' own class of the same shape.

A random model of Transformers is saved and imported, so that both compute the same loss from the same weights (checked
at the first step). Then both train: forward, loss, backward, gradient clipping, fused AdamW; fp32, eager, one thread,
vocabulary 8,192, no dropout. Both live in one process and take turns, so that a busy machine slows them alike. A row
shows the median CPU milliseconds of a step, and the median over the rounds of how many times as fast StackWise is.

    python benchmarks/family_steps.py                          # all families, about five minutes
    python benchmarks/family_steps.py --families llama bert    # some of them
    python benchmarks/family_steps.py --json figures.json

Masked families are scored on 15 % of the positions. StackWise asks the head about those alone, Transformers about all.

Needs `pip install transformers`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

from stackwise.interop.families import families
from stackwise.interop.hf_import import read_model
from stackwise.objectives.base import IGNORE, Example
from stackwise.objectives.head import head_loss
from stackwise.training.device import keep_freed_memory

WIDTH, LAYERS, HEADS, LENGTH, BATCH, VOCAB = 256, 4, 4, 128, 8, 8192
Step = Callable[[], Tensor]

LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 704,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
}
PLAIN = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
BERT = {
    **PLAIN,
    "intermediate_size": 4 * WIDTH,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
IDS = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
DEEPSEEK = {
    **LLAMA,
    "num_key_value_heads": HEADS,
    "moe_intermediate_size": 176,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
GEMMA = {**LLAMA, "head_dim": 64, **IDS}
GPT2 = {
    "vocab_size": VOCAB,
    "n_positions": LENGTH,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": HEADS,
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2),
    "llama": ("LlamaConfig", "LlamaForCausalLM", LLAMA),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**LLAMA, "sliding_window": 64}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", LLAMA),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**LLAMA, "head_dim": 64}),
    "bert": ("BertConfig", "BertForMaskedLM", BERT),
    "modernbert": (
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        {**PLAIN, **IDS, "local_attention": 64, "intermediate_size": 384},
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**LLAMA, "intermediate_size": 352, "num_local_experts": 8, "sliding_window": None},
    ),
    "deepseek_v2": ("DeepseekV2Config", "DeepseekV2ForCausalLM", {**DEEPSEEK, "q_lora_rank": None}),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {**DEEPSEEK, "q_lora_rank": 96, "n_group": 2, "topk_group": 1},
    ),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", GEMMA),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**GEMMA, "sliding_window": 64, "query_pre_attn_scalar": 64},
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**GEMMA, "sliding_window": 64, "sliding_window_pattern": 4, "query_pre_attn_scalar": 64},
    ),
}


@contextmanager
def quietly() -> Any:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def stepper(model: nn.Module, loss: Step) -> Step:
    """One whole training step of `model`; the same code for both."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, fused=True)

    def step() -> Tensor:
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


def contenders(family: str) -> tuple[dict[str, Step], int]:
    """A training step of each, and how many parameters both have."""
    with quietly():
        import transformers

        transformers.utils.logging.disable_progress_bar()
        config, cls, options = MODELS[family]
        theirs = getattr(transformers, cls)(getattr(transformers, config)(**options)).train()
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            rack = read_model(folder, tokenizer="byte").rack.train()
    ids = torch.randint(0, VOCAB, (BATCH, LENGTH))
    masked = families()[family].settings["attention_preset"] == "bert_style"
    labels = torch.full_like(ids, IGNORE)
    if masked:
        chosen = torch.rand(ids.shape) < 0.15
        labels[chosen] = ids[chosen]
    else:
        labels[:, :-1] = ids[:, 1:]
    scored = (labels != IGNORE).flatten().nonzero().squeeze(1) if masked else None
    example = Example(ids, labels, scored=scored)
    count = (labels != IGNORE).sum()

    def their_loss() -> Tensor:
        value: Tensor = theirs(input_ids=ids, labels=labels if masked else ids).loss
        return value

    def our_loss() -> Tensor:
        return head_loss(rack.forward_features(ids), rack.io.head, example) / count

    steps = {"Transformers": stepper(theirs, their_loss), "StackWise": stepper(rack, our_loss)}
    first = {name: float(step()) for name, step in steps.items()}
    if abs(first["StackWise"] / first["Transformers"] - 1) > 1e-5:
        raise RuntimeError(f"{family}: the losses differ: {first}")
    return steps, rack.get_parameter_count()


def measure(steps: dict[str, Step], seconds: float) -> dict[str, list[float]]:
    """CPU seconds per step of each, round by round; both take turns. At least five rounds."""

    def run(name: str, count: int) -> float:
        started = time.process_time()
        for _ in range(count):
            steps[name]()
        return (time.process_time() - started) / count

    counts = {name: max(1, round(0.5 / min(run(name, 1), run(name, 1)))) for name in steps}
    rounds: dict[str, list[float]] = {name: [] for name in steps}
    until = time.process_time() + seconds
    while time.process_time() < until or len(rounds["StackWise"]) < 5:
        for name, count in counts.items():
            rounds[name].append(run(name, count))
    return rounds


def main(argv: list[str] | None = None, show: Callable[[str], None] = print) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", choices=[*MODELS], default=[*MODELS])
    parser.add_argument("--seconds", type=float, default=25.0, help="CPU seconds to measure each family for")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    keep_freed_memory()
    results: dict[str, Any] = {
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "processor": torch.cpu.get_capabilities().get("cpu_name") or platform.machine(),
        "shape": f"width {WIDTH}, {LAYERS} layers, context {LENGTH}, batch {BATCH}, vocabulary {VOCAB}",
        "families": {},
    }
    show(
        f"{'':14}{'parameters':>12}{'Transformers':>14}{'StackWise':>11}  ms of a step; times as fast (range)"
    )
    for family in options.families:
        torch.manual_seed(0)
        steps, parameters = contenders(family)
        rounds = measure(steps, options.seconds)
        ratios = [a / b for a, b in zip(rounds["Transformers"], rounds["StackWise"], strict=True)]
        row = {
            "parameters": parameters,
            "rounds": len(ratios),
            "ms": {name: statistics.median(times) * 1e3 for name, times in rounds.items()},
            "times_as_fast": statistics.median(ratios),
            "range": [min(ratios), max(ratios)],
        }
        results["families"][family] = row
        show(
            f"{family:14}{parameters:12,}{row['ms']['Transformers']:14.0f}{row['ms']['StackWise']:11.0f}"
            f"{row['times_as_fast']:8.2f}  ({row['range'][0]:.2f} to {row['range'][1]:.2f})"
        )
        if options.json:
            options.json.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
