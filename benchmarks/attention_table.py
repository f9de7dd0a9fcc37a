"""Every attention under the same budget: cost per token, bytes of its cache, speed of decoding, loss on one small task.

All models have the same width, depth, feed-forward and data, and differ in nothing but their attention; parameters
differ by what it needs. They train for the same number of steps with the same learning rates, on the characters of a
text file, with several seeds.

    python benchmarks/attention_table.py --data folder           # folder/input.txt; about 8 CPU minutes
    python benchmarks/attention_table.py --data folder --quick   # one seed, few steps: 2 minutes
    python benchmarks/attention_table.py --report-only           # table and plot from the records that are there

CPU seconds are of this process on one thread. Decoding is one token for one row behind a text of the length named, with
the rack's own modules and random weights: the median of 16 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from frontier_budget import config_of
from stackwise.config.resolve import resolve
from stackwise.config.root import StackWiseConfig
from stackwise.curriculum.curricula import stages
from stackwise.data.corpus import Corpus
from stackwise.data.loader import TokenLoader
from stackwise.data.prepare import prepare
from stackwise.evaluation.perplexity import perplexity
from stackwise.model.attention_flops import attention_flops, attention_matrices
from stackwise.model.describe import block_spec, rack_spec
from stackwise.model.rack import Rack
from stackwise.objectives.build import objective_of
from stackwise.training.device import keep_freed_memory, pick_device, pick_dtype
from stackwise.training.hooks import Hooks
from stackwise.training.loop import Engine

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- generated: attention-table -->", "<!-- end of attention-table -->"
LENGTH, STEPS, SEEDS = 128, 150, (1, 2, 3)
LENGTHS = (256, 1024, 4096)
Keys = dict[str, Any]

CAUSAL: Keys = {"model.attention_overrides.attention_mode": "causal"}
ROWS: dict[str, Keys] = {
    "multi-head": {"model.attention_preset": "gpt_style"},
    "grouped-query (efficient_gqa)": {"model.attention_preset": "efficient_gqa", **CAUSAL},
    "multi-query": {"model.attention_preset": "gpt_style", "model.n_kv_heads": 1},
    "window of 32, 4 sinks": {
        "model.attention_preset": "gpt_style",
        "model.sliding_window": 32,
        "model.attention_sinks": 4,
    },
    "latent (mla_attention)": {"model.attention_preset": "mla_attention", **CAUSAL},
    "gaussian kernel (kernel_attention)": {"model.attention_preset": "kernel_attention", **CAUSAL},
    "softmax kernel, linear time": {
        "model.attention_preset": "kernel_attention",
        **CAUSAL,
        "model.attention_overrides.kernel_type": "linear",
        "model.attention_overrides.kernel_mode": "linear",
    },
    "latent, laplacian kernel (mlgka)": {"model.attention_preset": "mlgka", **CAUSAL},
}


def config_for(keys: Keys, seed: int, steps: int, data: Keys, longest: int = LENGTH) -> StackWiseConfig:
    """A model of 4 blocks of width 128 with the attention of `keys`."""
    return config_of(
        {
            "model.d_model": 128,
            "model.n_heads": 8,
            "model.max_seq_len": longest,
            "model.architecture.n_stacks": 1,
            "model.architecture.blocks_per_stack": 4,
            "model.tie_embeddings": False,
            "training.seq_len": LENGTH,
            "training.batch_size": 8,
            "training.max_steps": steps,
            "training.warmup_steps": steps // 10,
            "training.optimizer.lr": 3e-3,
            "training.device": "cpu",
            "training.dtype": "float32",
            "training.seed": seed,
            "training.progressive.enabled": False,
            "evaluation.batch_size": 8,
            **data,
            **keys,
        }
    )


def train(config: StackWiseConfig, corpus: Corpus) -> dict[str, Any]:
    """Train and score one model."""
    device = pick_device("cpu")
    config = resolve(config, vocab_size=corpus.tokenizer.vocab_size)[0]
    training = config.training
    engine = Engine(
        config,
        Rack(rack_spec(config), seed=training.seed),
        stages(config),
        TokenLoader(corpus.train, seq_len=LENGTH, batch_size=training.batch_size, seed=training.seed),
        device=device,
        dtype=pick_dtype(training.dtype, device),
        hooks=Hooks(),
        objective=objective_of(config, corpus.tokenizer.special_ids),
    )
    started = time.process_time()
    history = engine.run()
    seconds = time.process_time() - started
    scored = perplexity(engine.rack, corpus.validation, seq_len=LENGTH, batch_size=8)
    return {
        "loss": scored.nats_per_token,
        "cpu_seconds": seconds,
        "steps": training.max_steps,
        "peak_bytes": max(stage["bytes"]["peak"] for stage in history),
        "parameters": engine.rack.get_parameter_count(),
    }


def held_bytes(rack: Rack, capacity: int) -> int:
    """Bytes of all tensors of an empty cache for `capacity` tokens."""
    cache = rack.make_cache(1, capacity)
    tensors = [value for block in cache.blocks for value in vars(block).values()]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


@torch.inference_mode()
def decode(config: StackWiseConfig, length: int) -> tuple[int, float]:
    """Bytes of the cache, and CPU milliseconds for a token, behind `length` tokens."""
    rack = Rack(rack_spec(config)).eval()
    cache = rack.make_cache(1, length + 17)
    ids = torch.randint(0, rack.spec.vocab_size, (1, length + 17), generator=torch.Generator().manual_seed(1))
    rack.forward_features(ids[:, :length], cache=cache)
    spent = []
    for at in range(length, length + 17):
        started = time.process_time()
        rack.forward_features(ids[:, at : at + 1], cache=cache)
        spent.append(time.process_time() - started)
    return held_bytes(rack, length + 17), 1e3 * statistics.median(spent[1:])


def costs(name: str) -> dict[str, Any]:
    """What does not depend on training."""
    config = resolve(config_for(ROWS[name], 1, 1, {}, longest=LENGTHS[-1] + 64), vocab_size=64)[0]
    spec = block_spec(config.model)
    numbers = sum(rows * columns for rows, columns in attention_matrices(spec).values())
    decoded = {str(length): decode(config, length) for length in LENGTHS}
    return {
        "attention_parameters": numbers,
        "flops": {str(n): 2 * numbers + attention_flops(spec, n) for n in LENGTHS},
        "cache_bytes": {n: held for n, (held, _) in decoded.items()},
        "decode_ms": {n: spent for n, (_, spent) in decoded.items()},
    }


def record_of(name: str, seeds: tuple[int, ...], steps: int, data: Keys, corpus: Corpus) -> dict[str, Any]:
    """Everything about one attention."""
    runs = [train(config_for(ROWS[name], seed, steps, data), corpus) for seed in seeds]
    return {"name": name, "seeds": list(seeds), "runs": runs, **costs(name)}


# --- the page ----------------------------------------------------------------------------------------------------


def table(records: list[dict[str, Any]]) -> list[str]:
    runs = records[0]["runs"]
    lines = [
        f"4 blocks of width 128 with 8 heads, context {LENGTH}, {runs[0]['steps']} steps of 8 rows, "
        f"{len(runs)} seed{'s' * (len(runs) > 1)}; fp32 on one thread. Cost is FLOP per token of one attention, forward, in a row of "
        "that many tokens; decoding is a whole model's token behind that many.",
        "",
        "| attention | loss, nats per character | CPU s to train | peak MB | parameters of one | kFLOP at 256 | at 4096 "
        "| cache, bytes per token | decoding ms at 256 | at 4096 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        losses = [run["loss"] for run in record["runs"]]
        low, high = (record["cache_bytes"][str(n)] for n in (LENGTHS[1], LENGTHS[-1]))
        grows = (high - low) / (LENGTHS[-1] - LENGTHS[1])
        cells = [
            record["name"],
            f"{statistics.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})",
            f"{statistics.mean(run['cpu_seconds'] for run in record['runs']):.0f}",
            f"{max(run['peak_bytes'] for run in record['runs']) / 1e6:.1f}",
            f"{record['attention_parameters']:,}",
            *(f"{record['flops'][str(n)] / 1e3:.0f}" for n in (LENGTHS[0], LENGTHS[-1])),
            f"{grows:.0f}" if grows else f"0 ({high:,} in all)",
            *(f"{record['decode_ms'][str(n)]:.2f}" for n in (LENGTHS[0], LENGTHS[-1])),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def write_page(page: Path, records: list[dict[str, Any]]) -> None:
    """Put table and plot between the marks of a page."""
    text = page.read_text("utf-8") if page.exists() else f"{BEGIN}\n{END}\n"
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{page} lacks its marks {BEGIN} and {END}")
    head, tail = text.partition(BEGIN)[0], text.partition(END)[2]
    plot = page.with_name("attention.png")
    lines = [*table(records), "", f"![Loss, cache and decoding of each attention]({plot.name})"]
    page.write_text(f"{head}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{tail}", "utf-8")
    draw(plot, records)


def draw(path: Path, records: list[dict[str, Any]]) -> None:
    """Loss, bytes of the cache at 4096 tokens, and time of a token as the text grows."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
        figure = Figure(figsize=(12, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        loss, cache, decoding = figure.subplots(1, 3)
        names = [record["name"] for record in records]
        colours = [f"C{i}" for i in range(len(records))]
        for place, record in enumerate(records):
            losses = [run["loss"] for run in record["runs"]]
            loss.plot(losses, [place] * len(losses), "|", color=colours[place], markersize=9)
            loss.plot(statistics.mean(losses), place, "o", color=colours[place])
            cache.barh(place, record["cache_bytes"][str(LENGTHS[-1])] / 1e6, color=colours[place], height=0.6)
            spent = [record["decode_ms"][str(n)] for n in LENGTHS]
            decoding.plot(LENGTHS, spent, "o-", color=colours[place], label=record["name"])
        for axes in (loss, cache):
            axes.set_yticks(range(len(names)), names if axes is loss else [""] * len(names))
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.grid(axis="x", color="#e5e7eb")
            axes.set_axisbelow(True)
        loss.set_xlabel("loss, nats per character (ticks: seeds)")
        cache.set_xlabel(f"MB of cache at {LENGTHS[-1]} tokens")
        decoding.set_xlabel("tokens before")
        decoding.set_ylabel("CPU ms for the next token")
        decoding.set_xscale("log", base=2)
        decoding.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
        decoding.set_ylim(bottom=0)
        figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None, show: Callable[[str], None] = print) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with input.txt; needed to train")
    parser.add_argument(
        "--quick", action="store_true", help="one seed, 60 steps; the page goes beside the records"
    )
    parser.add_argument("--out", type=Path, help="folder of the records (default: benchmarks/records)")
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    keep_freed_memory()
    out = options.out or (ROOT / "runs" if options.quick else ROOT / "benchmarks" / "records")
    path, page = out / "attention-table.json", ROOT / "docs" / "models.md"
    if options.quick or options.out:
        page = out / "attention-table.md"
    if options.report_only:
        records = json.loads(path.read_text())
    else:
        if options.data is None or not (options.data / "input.txt").is_file():
            raise SystemExit(f"--data {options.data}: there is no file input.txt in it")
        data = {
            "data.source": "text",
            "data.path": str(options.data / "input.txt"),
            "data.tokenizer": "char",
        }
        corpus = prepare(config_of(data).data, out / ".data")
        records = []
        for name in ROWS:
            records.append(
                record_of(
                    name, (1,) if options.quick else SEEDS, 60 if options.quick else STEPS, data, corpus
                )
            )
            show(f"{name}: {[round(run['loss'], 3) for run in records[-1]['runs']]}")
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(records, indent=1) + "\n")
    write_page(page, records)
    return records


if __name__ == "__main__":
    main()
