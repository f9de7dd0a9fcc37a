"""Settings of the data: source, tokenizer, packing and order."""

from typing import Annotated, Literal

from annotated_types import MinLen

from stackwise.config.base import Settings
from stackwise.config.types import Flag, NonNegativeInt, PathText, PositiveInt, Share, Text


class DataSettings(Settings):
    """Where text comes from and how it becomes rows of tokens."""

    source: Literal["stdlib", "text", "jsonl", "parquet", "hf"] = "stdlib"
    """Kind of source: stdlib is the text of the installed Python's standard library; text, jsonl and parquet are files; hf a Hugging Face data set."""
    path: PathText | Annotated[list[PathText], MinLen(1)] | None = None
    """Files or globs, one or a list; for hf the name of the data set. Needed by every source but stdlib."""
    eval_path: PathText | Annotated[list[PathText], MinLen(1)] | None = None
    """Files of the held-out split; for hf the name of its split. null: cut from the training source by `eval_fraction`."""
    eval_fraction: Share = 0.1
    """Share of the source that is held out where there is no `eval_path`."""
    tokenizer: Text = "byte"
    """byte, char, the path of a tokenizer.json, or the id of a tokenizer on the Hugging Face hub."""
    text_key: Text = "text"
    """Field or column that holds the text, for jsonl, parquet and hf."""
    packing: Flag = True
    """Fill every row with consecutive documents. false: rows of one document each, padded."""
    bucketing: Flag = False
    """Without packing: batches of rows of about the same length, padded to the longest among them in place of `training.seq_len`. The order stays one of (seed, epoch), for any batch size; nothing else changes but the work that padding costs."""
    doc_mask: Flag = True
    """In a packed row, stop attention and positions at document edges."""
    shuffle: Flag = True
    """Visit the rows in a new order each epoch. The order depends on the seed, not on workers or ranks."""
    num_workers: NonNegativeInt = 0
    """Processes that read ahead; 0 reads in the training process."""
    max_bytes: PositiveInt | None = None
    """Take at most this many bytes of the source. null: all of it, and for stdlib the selection's own cap."""
    cache_dir: PathText | None = None
    """Folder of the prepared token shards. null: `.data` in `checkpoint.dir`."""
