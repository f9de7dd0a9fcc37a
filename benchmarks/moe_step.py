"""CPU time of one training step of a mixture of experts: forward, backward, gradient clipping, fused AdamW.

StackWise against Transformers' Mixtral with the same weights: same width, expert width, experts, experts per token,
heads, layers, vocabulary and data, the balancing loss included; SDPA attention; no dropout; fp32, eager mode, one thread.
Transformers has several ways to run experts; all that this processor can take are measured, and the ratios are to its
default and to its fastest.

All contenders live in one process and take turns, a few steps each, so that a busy machine slows them alike. A row
shows the median CPU milliseconds of a step, and the medians over the rounds of the ratios (above 1 = faster).

    python benchmarks/moe_step.py                       # all shapes, about three minutes
    python benchmarks/moe_step.py --shapes small        # some of them
    python benchmarks/moe_step.py --json figures.json

"Products, clipping and AdamW alone" is what no implementation can leave out: the matrix products of forward and backward
passes in these shapes (tokens spread evenly over the experts), each by the faster of PyTorch's route and StackWise's, and
the optimizer's work on parameters of these sizes; no attention scores, norms, activations, routing, loss or autograd.
Its ratio is the highest that anything could reach on this processor in fp32.

"StackWise, PyTorch's products" leaves matrix products to `torch.mm` as Mixtral does; on processors where StackWise knows
no faster route (see `stackwise.kernels.product`) it is the same as "StackWise".

Needs `pip install transformers`.
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
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

from stackwise.kernels.product import product, pytorch_products
from stackwise.model.factory import create_simple_rack
from stackwise.model.rack import Rack
from stackwise.model.router import routed
from stackwise.objectives.causal import CausalLM
from stackwise.training.device import keep_freed_memory

Step = Callable[[], Tensor]
AUX = 0.01


class Shape(NamedTuple):
    d_model: int
    d_ff: int
    n_experts: int
    top_k: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    seq_len: int
    batch: int
    vocab_size: int = 8192

    def __str__(self) -> str:
        return (
            f"d{self.d_model} ff{self.d_ff} E{self.n_experts} k{self.top_k} L{self.n_layers} T{self.seq_len} "
            f"B{self.batch} V{self.vocab_size}"
        )


SHAPES = {
    "small": Shape(256, 512, 8, 2, 4, 4, 2, 128, 8),
    "wide": Shape(512, 1024, 8, 2, 2, 8, 4, 256, 4),
    "many": Shape(256, 256, 32, 4, 4, 4, 2, 256, 4),
}
DEFAULT = "Transformers Mixtral"
IMPLEMENTATIONS = ("eager",)
OURS = "StackWise"
PLAIN = "StackWise, PyTorch's products"
FLOOR = "Products, clipping and AdamW alone"


def stepper(model: nn.Module, loss: Step) -> Step:
    """One whole training step of `model`; the same code for every contender."""
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


def stackwise(shape: Shape, ids: Tensor) -> tuple[Rack, Step]:
    rack = create_simple_rack(
        n_stacks=1,
        blocks_per_stack=shape.n_layers,
        d_model=shape.d_model,
        d_ff=shape.d_ff,
        n_heads=shape.n_heads,
        n_kv_heads=shape.n_kv_heads,
        vocab_size=shape.vocab_size,
        attention_preset="gpt_style",
        tie_embeddings=False,
        max_seq_len=shape.seq_len,
        experts={"n_experts": shape.n_experts, "top_k": shape.top_k, "aux_weight": AUX},
    )
    objective = CausalLM()
    example = objective.corrupt({"input_ids": ids})

    def loss() -> Tensor:
        with routed(rack, 1 / ids.numel()):
            hidden = rack.forward_features(example.input_ids)
        total, weight = objective.loss(hidden, rack.head, example)
        return total / weight

    return rack.train(), loss


def mixtral(shape: Shape, ids: Tensor, implementation: str | None) -> tuple[nn.Module, Step]:
    """`implementation` null: what Transformers takes by itself."""
    from transformers import MixtralConfig, MixtralForCausalLM

    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.d_model,
            intermediate_size=shape.d_ff,
            num_hidden_layers=shape.n_layers,
            num_attention_heads=shape.n_heads,
            num_key_value_heads=shape.n_kv_heads,
            num_local_experts=shape.n_experts,
            num_experts_per_tok=shape.top_k,
            max_position_embeddings=shape.seq_len,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            router_aux_loss_coef=AUX,
            output_router_logits=True,
            sliding_window=None,
            use_cache=False,
            attn_implementation="sdpa",
            **({} if implementation is None else {"experts_implementation": implementation}),
        )
    ).train()

    def loss() -> Tensor:
        value: Tensor = model(input_ids=ids, labels=ids).loss
        return value

    return model, loss


@torch.no_grad()
def take_over(rack: Rack, model: nn.Module) -> None:
    """Give Mixtral the weights of the rack."""
    theirs: Any = model
    theirs.model.embed_tokens.weight.copy_(rack.embedding.weight)
    theirs.model.norm.weight.copy_(rack.norm.weight)  # type: ignore[arg-type]
    theirs.lm_head.weight.copy_(rack.head.matrix)
    for layer, block in zip(theirs.model.layers, rack.blocks(), strict=True):
        for name in ("q", "k", "v", "o"):
            weight = getattr(block.attn, name).weight
            if name in "qk":  # neighbouring numbers are pairs here, those half a head apart are there
                heads = weight.unflatten(0, (-1, block.attn.head_dim // 2, 2))
                weight = heads.transpose(1, 2).reshape(weight.shape)
            getattr(layer.self_attn, f"{name}_proj").weight.copy_(weight)
        layer.input_layernorm.weight.copy_(block.attn_norm.weight)
        layer.post_attention_layernorm.weight.copy_(block.ffn_norm.weight)
        layer.mlp.gate.weight.copy_(block.ffn.router.weight)
        for i, expert in enumerate(block.ffn.experts):
            layer.mlp.experts.gate_up_proj[i].copy_(torch.cat([expert.gate.weight, expert.up.weight]))
            layer.mlp.experts.down_proj[i].copy_(expert.down.weight)


def floor(shape: Shape, parameters: list[nn.Parameter]) -> Step:
    """The work that is left when everything but the products and the optimizer's step costs nothing."""
    tokens, width = shape.batch * shape.seq_len, shape.d_model
    visited = tokens * shape.top_k // shape.n_experts
    narrow = width // shape.n_heads * shape.n_kv_heads
    block = [(tokens, width, width)] * 2 + [(tokens, width, narrow)] * 2
    block += [(visited, width, shape.d_ff)] * 2 * shape.n_experts + [
        (visited, shape.d_ff, width)
    ] * shape.n_experts
    products = [_products(*sizes) for sizes in [*block * shape.n_layers, (tokens, width, shape.vocab_size)]]
    held = [nn.Parameter(p.detach().clone()) for p in parameters]
    for p in held:
        p.grad = torch.randn_like(p)
    optimizer = torch.optim.AdamW(held, lr=1e-4, weight_decay=0.01, fused=True)

    def step() -> Tensor:
        for multiply in products:
            multiply()
        norm = torch.nn.utils.clip_grad_norm_(held, 1.0)
        optimizer.step()
        return norm

    return step


def _products(rows: int, inner: int, columns: int) -> Callable[[], None]:
    """Output, gradient of the input and gradient of the weights of one linear layer, by the faster route."""
    x, w, dy = torch.randn(rows, inner), torch.randn(columns, inner), torch.randn(rows, columns)
    wt, xt, dyt = (t.T.contiguous() for t in (w, x, dy))

    def plain() -> None:
        for a, b in ((x, w), (dy, wt), (dyt, xt)):
            torch.mm(a, b.T)

    def routed_products() -> None:
        for a, b in ((x, w), (dy, wt), (dyt, xt)):
            product(a, b)

    return min((plain, routed_products), key=_seconds)


def _seconds(action: Callable[[], None]) -> float:
    times = []
    for _ in range(4):
        started = time.process_time()
        action()
        times.append(time.process_time() - started)
    return min(times)


def contenders(shape: Shape) -> dict[str, Step]:
    """A training step of each, from the same weights; logits further apart than 1e-3 are a RuntimeError."""
    ids = torch.randint(0, shape.vocab_size, (shape.batch, shape.seq_len))
    first, loss = stackwise(shape, ids)
    second, plain_loss = stackwise(shape, ids)
    second.load_state_dict(first.state_dict())
    steps = {OURS: stepper(first, loss), PLAIN: stepper(second, plain_loss)}
    with torch.no_grad():
        logits = first(ids)
    for implementation in (None, *IMPLEMENTATIONS):
        model, their_loss = mixtral(shape, ids, implementation)
        take_over(first, model)
        name = DEFAULT if implementation is None else f"{DEFAULT}, {implementation}"
        with torch.no_grad():
            apart = float((model(input_ids=ids).logits - logits).abs().max())
        if apart > 1e-3:
            raise RuntimeError(f"the logits of {name} are {apart:.2g} away from StackWise's")
        steps[name] = stepper(model, their_loss)
    steps[FLOOR] = floor(shape, list(first.parameters()))
    return steps


def measure(steps: dict[str, Step], seconds: float) -> dict[str, list[float]]:
    """CPU seconds per step of each, round by round. At least five rounds; all take turns within a round."""
    counts: dict[str, int] = {}

    def run(name: str, count: int) -> float:
        with pytorch_products() if name == PLAIN else nullcontext():
            started = time.process_time()
            for _ in range(count):
                steps[name]()
            return (time.process_time() - started) / count

    for name in steps:  # warm-up
        run(name, 2)
        counts[name] = max(1, round(0.3 / run(name, 1)))
    rounds: dict[str, list[float]] = {name: [] for name in steps}
    until = time.process_time() + seconds
    while time.process_time() < until or len(rounds[name]) < 5:
        for name, count in counts.items():
            rounds[name].append(run(name, count))
    return rounds


def summary(shape: Shape, rounds: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, and the median and range of the ratios within a round."""
    theirs = {name: times for name, times in rounds.items() if name.startswith(DEFAULT)}
    fastest = min(theirs, key=lambda name: statistics.median(theirs[name]))
    rows = {}
    for name, times in rounds.items():
        ratios = [b / a for a, b in zip(times, rounds[DEFAULT], strict=True)]
        closest = [b / a for a, b in zip(times, rounds[fastest], strict=True)]
        rows[name] = {
            "ms_per_step": statistics.median(times) * 1e3,
            "tokens_per_cpu_second": shape.batch * shape.seq_len / statistics.median(times),
            "vs_default": statistics.median(ratios),
            "range": [min(ratios), max(ratios)],
            "vs_fastest": statistics.median(closest),
        }
    return {"shape": shape._asdict(), "rounds": len(rounds[DEFAULT]), "fastest": fastest, "rows": rows}


def main(argv: list[str] | None = None, show: Callable[[str], None] = print) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES], default=[*SHAPES])
    parser.add_argument("--seconds", type=float, default=40.0, help="CPU seconds to measure each shape for")
    parser.add_argument("--keep-memory", action="store_true", help="set malloc as `stackwise train` does")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.keep_memory:
        keep_freed_memory()
    results: dict[str, Any] = {
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "processor": torch.cpu.get_capabilities().get("cpu_name") or platform.machine(),
        "keep_memory": options.keep_memory,
        "shapes": {},
    }
    for key in options.shapes:
        torch.manual_seed(0)
        shape = SHAPES[key]
        results["shapes"][key] = found = summary(shape, measure(contenders(shape), options.seconds))
        show(f"{key}: {shape}, {found['rounds']} rounds, fastest of Transformers: {found['fastest']}")
        show(f"  {'':36}{'ms/step':>9}{'tokens/s':>10}{'vs default':>12}{'vs fastest':>12}")
        for name, row in found["rows"].items():
            show(
                f"  {name:36}{row['ms_per_step']:9.1f}{row['tokens_per_cpu_second']:10.0f}"
                f"{row['vs_default']:12.2f}{row['vs_fastest']:12.2f}"
                f"  ({row['range'][0]:.2f} to {row['range'][1]:.2f})"
            )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
