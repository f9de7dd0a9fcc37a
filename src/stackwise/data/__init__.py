"""Sources, tokenizers, token shards, packing and the stateful loader."""
