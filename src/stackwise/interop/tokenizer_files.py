"""The tokenizer of a run as the files that Transformers reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stackwise.data.tokenizers import EOS, PAD, ByteTokenizer, CharTokenizer, Tokenizer
from stackwise.storage import ops

_ROLES = {
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>", "<｜begin▁of▁sentence｜>"),
    "unk_token": ("<unk>", "[UNK]"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
}
"""Further special tokens by the names in use."""


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    definition = library_definition(tokenizer)
    names = {token["id"]: token["content"] for token in definition["added_tokens"]}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    for role, id_ in (
        ("eos_token", tokenizer.eos_id),
        ("pad_token", tokenizer.pad_id),
        ("mask_token", tokenizer.mask_id),
    ):
        if id_ is not None and id_ in names:
            config[role] = names[id_]
    for role, known in _ROLES.items():
        found = next((name for name in known if name in names.values()), None)
        if found is not None:
            config[role] = found
    for name, data in (("tokenizer.json", definition), ("tokenizer_config.json", config)):
        text = json.dumps(data, ensure_ascii=False, indent=2 if data is config else None)
        ops.write_new(folder / name, [f"{text}\n".encode()], kind="export")


def library_definition(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of a tokenizer.json that gives the same ids: our own kinds become pieces of one character each."""
    if isinstance(tokenizer, ByteTokenizer):
        return _of_pieces(_byte_alphabet(), {EOS: tokenizer.eos_id, PAD: tokenizer.pad_id}, of_bytes=True)
    if isinstance(tokenizer, CharTokenizer):
        special = {EOS: tokenizer.eos_id, PAD: tokenizer.pad_id} if tokenizer.separated else {}
        return _of_pieces(tokenizer.characters, special, of_bytes=False)
    return tokenizer.definition()


def _of_pieces(pieces: list[str], special: dict[str, Any], *, of_bytes: bool) -> dict[str, Any]:
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    library = Library(models.BPE(vocab=vocabulary, merges=[]))
    if of_bytes:
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel() if of_bytes else decoders.Fuse()
    library.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    for name, id_ in special.items():
        assert library.token_to_id(name) == id_
    data: dict[str, Any] = json.loads(library.to_str())
    return data


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies: itself where it can be shown, else U+0100 on."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) if byte in shown else chr(256 + hidden.index(byte)) for byte in range(256)]
