"""CPU time of one training step: forward, backward, gradient clipping, fused AdamW.

StackWise against Transformers' Llama (SDPA attention, its own loss) and litgpt with models of the same shape: same
width, feed-forward width, heads, layers, vocabulary, parameters and data; no dropout; eager mode; one thread. fp32 for
everyone, and StackWise once more in its default number format (bfloat16 where the processor multiplies it).

All contenders live in one process and take turns, a few steps each, so that a busy machine slows them alike. A row
shows the median CPU milliseconds of a step, and the medians over the rounds of the ratios to Llama, to StackWise's own
fp32, and to StackWise's fp32 with PyTorch's products (above 1 = faster).

    python benchmarks/training_step.py                       # all shapes, about four minutes
    python benchmarks/training_step.py --shapes small deep   # some of them
    python benchmarks/training_step.py --keep-memory         # with malloc set as `stackwise train` sets it
    python benchmarks/training_step.py --json figures.json

"StackWise fp32, PyTorch's products" leaves matrix products to `torch.mm` as the peers do; on processors where StackWise
knows no faster route (see `stackwise.kernels.product`) it is the same as "StackWise fp32".

Needs `pip install transformers`; litgpt joins in when it is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stackwise.kernels.product import pytorch_products
from stackwise.model.factory import create_simple_rack
from stackwise.model.settings import default_d_ff
from stackwise.objectives.causal import CausalLM
from stackwise.training.device import computing_in, keep_freed_memory, pick_device, pick_dtype

Step = Callable[[], Tensor]


class Shape(NamedTuple):
    d_model: int
    n_layers: int
    n_heads: int
    seq_len: int
    batch: int
    vocab_size: int

    def __str__(self) -> str:
        return f"d{self.d_model} L{self.n_layers} T{self.seq_len} B{self.batch} V{self.vocab_size}"


SHAPES = {
    "small": Shape(128, 4, 4, 64, 12, 65),
    "deep": Shape(256, 8, 8, 256, 16, 65),
    "small-32k": Shape(128, 4, 4, 64, 12, 32_000),
    "deep-32k": Shape(256, 8, 8, 256, 16, 32_000),
}


def stepper(model: nn.Module, loss: Step) -> Step:
    """One whole training step of `model`; the same code for every contender."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> Tensor:
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


def stackwise(shape: Shape, ids: Tensor, tied: bool, dtype: torch.dtype) -> tuple[nn.Module, Step]:
    rack = create_simple_rack(
        n_stacks=1,
        blocks_per_stack=shape.n_layers,
        d_model=shape.d_model,
        d_ff=default_d_ff(shape.d_model, "swiglu"),
        n_heads=shape.n_heads,
        vocab_size=shape.vocab_size,
        attention_preset="gpt_style",
        tie_embeddings=tied,
        max_seq_len=shape.seq_len,
    )
    objective, batch = CausalLM(), {"input_ids": ids[:, :-1], "next_ids": ids[:, -1]}

    def loss() -> Tensor:
        example = objective.corrupt(batch)
        with computing_in(dtype, rack.device):
            hidden = rack.forward_features(example.input_ids)
            total, count = objective.loss(hidden, rack.head, example)
        return total / count

    return rack.train(), loss


def llama(shape: Shape, ids: Tensor, tied: bool) -> tuple[nn.Module, Step]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.d_model,
        intermediate_size=default_d_ff(shape.d_model, "swiglu"),
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        max_position_embeddings=shape.seq_len,
        tie_word_embeddings=tied,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    inputs = ids[:, :-1].contiguous()
    return model, lambda: model(input_ids=inputs, labels=inputs).loss


def litgpt(shape: Shape, ids: Tensor, tied: bool) -> tuple[nn.Module, Step]:
    from litgpt import GPT, Config

    model = GPT(
        Config(
            block_size=shape.seq_len,
            vocab_size=shape.vocab_size,
            padded_vocab_size=shape.vocab_size,
            n_layer=shape.n_layers,
            n_head=shape.n_heads,
            n_embd=shape.d_model,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            mlp_class_name="LLaMAMLP",
            intermediate_size=default_d_ff(shape.d_model, "swiglu"),
        )
    ).train()
    if tied:
        model.lm_head.weight = model.transformer.wte.weight
    inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].reshape(-1)
    return model, lambda: F.cross_entropy(model(inputs).flatten(0, 1), labels)


def contenders(shape: Shape, tied: bool) -> dict[str, Step]:
    """A training step of each, after checking that all have equally many parameters."""
    ids = torch.randint(0, shape.vocab_size, (shape.batch, shape.seq_len + 1))
    default = pick_dtype("auto", pick_device("cpu"))
    built = {
        "Transformers Llama": llama(shape, ids, tied),
        "StackWise fp32": stackwise(shape, ids, tied, torch.float32),
        "StackWise fp32, PyTorch's products": stackwise(shape, ids, tied, torch.float32),
    }
    if find_spec("litgpt"):
        built["litgpt"] = litgpt(shape, ids, tied)
    if default != torch.float32:
        name = str(default).removeprefix("torch.")
        built[f"StackWise default ({name})"] = stackwise(shape, ids, tied, default)
    counts = {name: sum(p.numel() for p in model.parameters()) for name, (model, _) in built.items()}
    if len(set(counts.values())) != 1:
        raise RuntimeError(f"the models differ in size: {counts}")
    return {name: stepper(model, loss) for name, (model, loss) in built.items()}


def measure(steps: dict[str, Step], seconds: float) -> dict[str, list[float]]:
    """CPU seconds per step of each, round by round. At least five rounds; all take turns within a round."""
    counts: dict[str, int] = {}

    def run(name: str, count: int) -> float:
        with pytorch_products() if "PyTorch" in name else nullcontext():
            started = time.process_time()
            for _ in range(count):
                steps[name]()
            return (time.process_time() - started) / count

    for name in steps:  # warm-up; then chunks of about a third of a second, in which caches settle
        run(name, 2)
        counts[name] = max(1, round(0.3 / run(name, 1)))
    rounds: dict[str, list[float]] = {name: [] for name in steps}
    until = time.process_time() + seconds
    while time.process_time() < until or len(rounds[name]) < 5:
        for name, count in counts.items():
            rounds[name].append(run(name, count))
    return rounds


def summary(shape: Shape, rounds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and medians of the ratios within a round."""
    rows = {}
    for name, times in rounds.items():
        rows[name] = {
            "ms_per_step": statistics.median(times) * 1e3,
            "tokens_per_cpu_second": shape.batch * shape.seq_len / statistics.median(times),
            **{
                key: statistics.median(b / a for a, b in zip(times, rounds[base], strict=True))
                for key, base in (
                    ("vs_llama", "Transformers Llama"),
                    ("vs_own_fp32", "StackWise fp32"),
                    ("vs_own_fp32_pytorch", "StackWise fp32, PyTorch's products"),
                )
            },
        }
    return {"shape": shape._asdict(), "rounds": len(times), "rows": rows}


def main(argv: list[str] | None = None, show: Callable[[str], None] = print) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES], default=[*SHAPES])
    parser.add_argument("--seconds", type=float, default=40.0, help="CPU seconds to measure each shape for")
    parser.add_argument("--tied", action="store_true", help="tie embedding and head in all models")
    parser.add_argument("--keep-memory", action="store_true", help="set malloc as `stackwise train` does")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.keep_memory:
        keep_freed_memory()
    results: dict[str, Any] = {
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "processor": torch.cpu.get_capabilities().get("cpu_name") or platform.machine(),
        "tied": options.tied,
        "keep_memory": options.keep_memory,
        "shapes": {},
    }
    for key in options.shapes:
        torch.manual_seed(0)
        shape = SHAPES[key]
        results["shapes"][key] = found = summary(
            shape, measure(contenders(shape, options.tied), options.seconds)
        )
        show(f"{key}: {shape}, {found['rounds']} rounds")
        show(f"  {'':36}{'ms/step':>9}{'tokens/s':>10}{'vs Llama':>10}{'vs fp32':>10}{'vs fp32 PyT.':>14}")
        for name, row in found["rows"].items():
            show(
                f"  {name:36}{row['ms_per_step']:9.1f}{row['tokens_per_cpu_second']:10.0f}"
                f"{row['vs_llama']:10.2f}{row['vs_own_fp32']:10.2f}{row['vs_own_fp32_pytorch']:14.2f}"
            )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
