"""A run folder for a model that was trained elsewhere, so that everything that takes a run takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stackwise.checkpoint.store import Store
from stackwise.config.document import dump
from stackwise.config.resolve import resolve
from stackwise.interop.hf_import import Imported
from stackwise.tracking.events import Tracker
from stackwise.tracking.folder import RunFolder
from stackwise.tracking.metrics import MetricsFile
from stackwise.training.progress import Progress
from stackwise.training.state import FORMAT


def adopt(model: Imported, out: str | Path) -> RunFolder:
    """Write the run folder `out`. Its configuration starts a new run from it (`checkpoint.init_from`).

    RunFolderError where `out` holds a run already.
    """
    folder = RunFolder.create(out)
    model.tokenizer.save(folder.tokenizer)
    config = model.config.model_copy(deep=True)
    config.data.tokenizer = str(folder.tokenizer)
    config.training.run_id, config.checkpoint.dir = folder.path.name, str(folder.path.parent)
    config.checkpoint.init_from = str(folder.path)
    config, _ = resolve(config, vocab_size=model.tokenizer.vocab_size, mask_id=model.tokenizer.mask_id)
    folder.write_config(dump(config.to_dict()))
    folder.write_environment()
    for stack in model.rack.stacks:
        stack.trained = True
    model.rack.spec = model.rack.spec.with_stacks([stack.spec for stack in model.rack.stacks])
    metrics = MetricsFile(folder.path)
    with Tracker([metrics]) as tracker:
        for event in _events(model, config.training.run_id, config.training.seq_len):
            tracker.emit(event)
        size = metrics.size()
    meta: dict[str, Any] = {
        "format": FORMAT,
        "rack": model.rack.spec.to_dict(),
        "stages": [],
        "progress": Progress().to_dict(),
        "loader": {},
        "scaler": None,
        "metrics_bytes": size,
        "corpus": "",
        "tokenizer": model.tokenizer.hash,
        "imported": {
            "source": str(model.source),
            "family": model.family.model_type,
            "dtype": model.dtype,
            "generation": model.generation,
            "ids": model.ids,
        },
    }
    parts = {f"{part}/weights": tensors for part, tensors in model.rack.parts().items()}
    Store(folder.store).commit(parts, meta, step=0, pin="imported")
    return folder


def _events(model: Imported, run_id: str, seq_len: int) -> list[dict[str, Any]]:
    start = {
        "event": "run_start",
        "run_id": run_id,
        "stages": [],
        "total_steps": 0,
        "device": "cpu",
        "dtype": "float32",
        "n_params": model.rack.get_parameter_count(),
        "start_step": 0,
        "vocab_size": model.rack.spec.vocab_size,
        "seq_len": seq_len,
        "batch_tokens": 0,
    }
    note = {"event": "note", "message": f"imported from {model.source} ({model.family.model_type})"}
    zeros = {"step": 0, "seconds": 0.0, "final_loss": None, "tokens": 0, "flops": 0.0}
    end = {"event": "run_end", **zeros, "status": "done", "peak_rss_bytes": 0}
    return [start, note, end]
