"""`stackwise info`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stackwise.cli.options import RUNS, Json, Threads
from stackwise.cli.output import print_json

EXTRAS = {
    "matplotlib": ("the plots of a report", "train"),
    "tensorboard": ("tracking.sinks=[tensorboard]", "track"),
    "trackio": ("tracking.sinks=[trackio]", "track"),
    "wandb": ("tracking.sinks=[wandb]", "wandb"),
    "peft": ("training.progressive.qlora_enabled", "adapters"),
    "lm_eval": ("`stackwise eval --tasks` with lm-eval's tasks by name", "eval"),
    "sklearn": ("`stackwise nlu`", "nlu"),
    "pyarrow": ("data.source=parquet", "parquet"),
    "datasets": ("data.source=hf", "hf"),
    "huggingface_hub": ("data.tokenizer from the hub", "hf"),
}
"""Optional package -> what it is for, and the extra that installs it."""


def info(as_json: Json = False, threads: Threads = None) -> None:
    """Show versions, devices, number formats, memory, threads and paths: what a run would find here.

    \b
    Examples:
      stackwise info
      stackwise info --json
    """
    facts = _facts()
    if as_json:
        print_json(facts)
        return
    for section, values in facts.items():
        print(section)
        for name, value in values.items():
            label = name.removesuffix("_bytes").replace("_", " ")
            print(
                f"  {label:<17} {_missing(name) if value is False and name in EXTRAS else _text(name, value)}"
            )


def _facts() -> dict[str, dict[str, Any]]:
    import torch

    import stackwise
    from stackwise.config.presets import FOLDER, preset_names
    from stackwise.tracking.environment import environment
    from stackwise.training.device import available_devices, has_native_bfloat16, pick_device, pick_dtype

    where = environment()
    auto = pick_device("auto")
    return {
        "packages": {"stackwise": stackwise.__version__, "python": where["python"], **where["packages"]},
        "optional": {name: find_spec(name) is not None for name in EXTRAS},
        "machine": {name: where[name] for name in ("os", "cpu", "cpus", "memory_bytes")},
        "compute": {
            "devices": available_devices(),
            "device_auto": str(auto),
            "dtype_auto": str(pick_dtype("auto", auto)).removeprefix("torch."),
            "native_bfloat16": has_native_bfloat16(auto),
            "threads": torch.get_num_threads(),
        },
        "paths": {
            "package": str(Path(stackwise.__file__).parent),
            "presets": str(FOLDER),
            "runs": str(RUNS.resolve()),
        },
        "presets": {name: str(FOLDER / f"{name}.yaml") for name in preset_names()},
    }


def _missing(name: str) -> str:
    use, extra = EXTRAS[name]
    return f"no; {use} needs: pip install 'stackwise[{extra}]'"


def _text(name: str, value: Any) -> str:
    from stackwise.tracking import units

    if name == "memory_bytes":
        return units.size(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list) else str(value)
