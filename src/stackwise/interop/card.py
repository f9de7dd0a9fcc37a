"""The model card: README.md of an exported folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stackwise.config.root import StackWiseConfig
from stackwise.interop.own import MODEL_TYPE
from stackwise.model.spec import RackSpec
from stackwise.storage import ops


def write_card(
    folder: Path, spec: RackSpec, parameters: int, family: str, name: str, dtype: str, facts: dict[str, str]
) -> Path:
    """Write it: what the model is, how to load it, and the facts of its run by name."""
    block = spec.blocks[0]
    rows = {
        "Family": family if family != MODEL_TYPE else "its own (StackWise)",
        "Parameters": f"{parameters:,}",
        "Layers": f"{len(spec.blocks)}, trained as stacks of {', '.join(str(len(s.blocks)) for s in spec.stacks)}",
        "Width": f"{spec.d_model}, {block.n_heads} heads ({block.n_kv_heads} for keys and values)",
        "Vocabulary": f"{spec.vocab_size:,} tokens",
        "Longest row": f"{spec.max_seq_len:,} tokens",
        "Attention": "causal" if spec.is_causal else "bidirectional",
        "Weights": dtype,
        **facts,
    }
    auto = "AutoModelForCausalLM" if spec.is_causal else "AutoModelForMaskedLM"
    load = [f"from transformers import {auto}, AutoTokenizer", ""]
    if family == MODEL_TYPE:
        load.insert(0, "import stackwise.interop.transformers  # makes the model known to Transformers")
    load += [
        f'model = {auto}.from_pretrained("{name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
    ]
    lines = [
        "---",
        "library_name: transformers",
        f"pipeline_tag: {'text-generation' if spec.is_causal else 'fill-mask'}",
        "tags:",
        "- stackwise",
        f"- {family}" if family != MODEL_TYPE else "- custom-architecture",
        "---",
        "",
        f"# {name}",
        "",
        "Trained stack by stack with StackWise." if facts else "Written by StackWise.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {' '.join(text.split()).replace('|', '/')} |" for key, text in rows.items()),
        "",
        "```python",
        *load,
        "```",
        "",
    ]
    path = folder / "README.md"
    ops.write_new(path, ["\n".join(lines).encode()], kind="export")
    return path


def run_facts(config: StackWiseConfig, meta: dict[str, Any]) -> dict[str, str]:
    """What the state of a run (see `training.state`) tells about its training, by name; empty where it has none."""
    origin = meta.get("imported")
    if origin is not None:
        return {"Imported from": f"{Path(origin['source']).name} ({origin['family']})"}
    progress = meta["progress"]
    facts = {
        "Objective": config.training.progressive.training_objective,
        "Text": config.data.source,
        "Tokenizer": config.data.tokenizer if config.data.tokenizer in ("byte", "char") else "tokenizer.json",
        "Steps": f"{progress['step']:,}, {progress['tokens']:,} tokens, {progress['flops']:.3g} FLOPs",
        "Time": f"{progress['seconds']:,.0f} seconds",
    }
    if progress["eval_loss"] is not None:
        facts["Held-out loss"] = f"{progress['eval_loss']:.4f} nats per token"
    if progress["history"]:
        facts["Stages"] = ", ".join(f"{e['name']} ({e['steps']:,} steps)" for e in progress["history"])
    if config.checkpoint.init_from is not None:
        facts["Started from"] = Path(config.checkpoint.init_from).name
    return facts
