"""What a plan must know besides the config: of the data, the device and the rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stackwise.config.resolve import resolve
from stackwise.planning.devices import Device

if TYPE_CHECKING:
    from stackwise.config.root import StackWiseConfig
    from stackwise.data.corpus import Corpus


@dataclass(frozen=True)
class Data:
    """What the data says: tokens of the tokenizer (and which of them hides others), steps of an epoch, rows. Null where it was not looked at."""

    vocab_size: int | None = None
    steps_per_epoch: int | None = None
    n_rows: int | None = None
    corpus: Corpus | None = None
    mask_id: int | None = None


def data_facts(config: StackWiseConfig, corpus: Corpus | None) -> Data:
    """From the data where the plan depends on it."""
    from stackwise.data.tokenizers import ByteTokenizer

    if corpus is None:
        epochs = any(record.epochs is not None for record in config.training.stages or [])
        if config.training.max_steps is not None and not epochs:
            if config.model.vocab_size is not None:
                return Data()
            if config.data.tokenizer == "byte":
                return Data(ByteTokenizer().vocab_size)
    from stackwise.data.prepare import prepare
    from stackwise.training.loaders import loader_steps, make_loader

    resolved, _ = resolve(config)
    assert resolved.data.cache_dir is not None
    corpus = corpus or prepare(resolved.data, resolved.data.cache_dir)
    loader = make_loader(resolved, corpus)
    tokenizer = corpus.tokenizer
    return Data(tokenizer.vocab_size, loader_steps(resolved, loader), loader.rows, corpus, tokenizer.mask_id)


def own_device(config: StackWiseConfig) -> str:
    """The device that the run would take on this machine."""
    if config.training.device == "cpu":
        return "cpu"
    from stackwise.training.device import pick_device

    return str(pick_device(config.training.device))


def compute_dtype(config: StackWiseConfig, device: Device) -> str:
    """The dtype that the run computes in on a device. One it cannot compute in is a ConfigError."""
    import torch

    from stackwise.training.device import pick_dtype

    if config.training.dtype == "auto" and device.kind != "cpu":
        return "bfloat16" if device.has_bfloat16 else "float32"
    return str(pick_dtype(config.training.dtype, torch.device(device.kind))).removeprefix("torch.")


def has_edges(config: StackWiseConfig) -> bool:
    """Whether rows may hold padding or the edge of a document, so that attention needs a mask."""
    data = config.data
    if not data.packing:
        return True
    one = data.source == "text" and isinstance(data.path, str) and Path(data.path).is_file()
    return data.doc_mask and not one
