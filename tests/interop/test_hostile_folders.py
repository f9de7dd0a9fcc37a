"""A model folder made to do harm is refused with exit code 8, before anything outside of it is read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from stackwise.adapters.io import load_set
from stackwise.config.errors import ConfigError
from stackwise.interop.errors import InterchangeError
from stackwise.interop.folder import ModelFolder
from stackwise.interop.hf_import import read_model
from stackwise.interop.limits import check_config
from stackwise.model.files import load_tensors
from stackwise.storage.errors import DamagedFileError, UnsafeInputError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards, an index and a configuration; a file that must not be read lies beside the folder."""
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text("{}")
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, made / "one.safetensors")
    save_file({"c": torch.ones(4)}, made / "two.safetensors")
    point(made, a="one.safetensors", b="one.safetensors", c="two.safetensors")
    save_file({"secret": torch.ones(1)}, tmp_path / "secret.safetensors")
    return made


def point(folder: Path, **places: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def put(folder: Path, name: str, **tensors: torch.Tensor) -> None:
    save_file(tensors, folder / name)


def test_a_plain_folder_is_read(folder: Path) -> None:
    opened = ModelFolder(folder)
    assert opened.shapes == {"a": (2,), "b": (3,), "c": (4,)}
    assert opened.get("c").sum() == 4


@pytest.mark.parametrize(
    "name",
    [
        *(
            "../secret.safetensors",
            "/etc/passwd",
            "sub/x.safetensors",
            "..",
            ".",
            "",
            "a\\b",
            "c:\\x",
            "x\0y",
        ),
        *(
            "one.safetensors\n",
            " one.safetensors",
            "one.safetensors ",
            "~/x",
            "$HOME",
            "%2e%2e/x",
            "ône.safetensors",
        ),
        *("\u202eone", "x" * 300, None, 3, ["one.safetensors"], {"x": 1}, True),
    ],
)
def test_a_shard_that_is_no_name_in_the_folder(name: object, folder: Path) -> None:
    point(folder, a=name)
    with pytest.raises((UnsafeInputError, InterchangeError)) as caught:
        ModelFolder(folder)
    assert isinstance(caught.value, UnsafeInputError)


@pytest.mark.parametrize("kind", ["link", "link outside", "pipe", "folder", "device", "loop"])
@pytest.mark.parametrize("file", ["two.safetensors", "config.json", INDEX])
def test_a_file_that_is_no_regular_file_of_the_folder(kind: str, file: str, folder: Path) -> None:
    path = folder / file
    path.rename(folder / "old")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        target = {"link": "old", "link outside": "../secret.safetensors", "device": "/dev/zero", "loop": file}
        path.symlink_to(target[kind])
    with pytest.raises((UnsafeInputError, FileNotFoundError, InterchangeError)):
        ModelFolder(folder)
    if kind.startswith("link"):
        with pytest.raises(UnsafeInputError, match="is a link"):
            ModelFolder(folder)


def test_shards_must_be_what_the_index_says(folder: Path) -> None:
    put(folder, "two.safetensors", c=torch.ones(4), a=torch.zeros(2))
    with pytest.raises(UnsafeInputError, match=r"two\.safetensors holds the tensor 'a', but .* is in one"):
        ModelFolder(folder)
    put(folder, "two.safetensors", c=torch.ones(4), d=torch.zeros(2))
    with pytest.raises(UnsafeInputError, match=r"'d', but .* does not know it"):
        ModelFolder(folder)
    put(folder, "two.safetensors", d=torch.ones(4))
    with pytest.raises(UnsafeInputError, match="'d'"):
        ModelFolder(folder)
    put(folder, "two.safetensors")
    with pytest.raises(InterchangeError, match="lacks the tensor 'c'"):
        ModelFolder(folder)
    (folder / "two.safetensors").unlink()
    with pytest.raises(InterchangeError, match="lacks two"):
        ModelFolder(folder)
    put(folder, "two.safetensors", c=torch.ones(4))
    (folder / INDEX).write_text('{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}')
    with pytest.raises(UnsafeInputError, match="'a' is given twice"):
        ModelFolder(folder)
    put(folder, "TWO.safetensors", b=torch.ones(4))
    point(folder, a="one.safetensors", b="TWO.safetensors", c="two.safetensors")
    with pytest.raises(UnsafeInputError, match="one file on some disks"):
        ModelFolder(folder)
    point(folder, a="pytorch_model-00001.bin")
    with pytest.raises(UnsafeInputError, match="a pickle"):
        ModelFolder(folder)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.pth", "x.ckpt", ".metadata", "w.npy", "w.joblib"]
)
def test_pickles_are_never_opened(name: str, folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / name).write_bytes(b"\x80\x04cposix\nsystem\n(S'false'\ntR.")
    with pytest.raises(UnsafeInputError, match="a pickle"):
        ModelFolder(folder)
    with pytest.raises(UnsafeInputError, match=r"pickle|too few"):
        load_tensors(folder / name)
    if name != ".metadata":
        with pytest.raises(UnsafeInputError, match="never opened"):
            ModelFolder(folder / name)
    (folder / name).rename(folder / "model.safetensors")  # under another name it is none the better
    with pytest.raises((UnsafeInputError, DamagedFileError)):
        ModelFolder(folder)


def test_pickled_adapters_are_never_opened(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UnsafeInputError, match=r"adapter_model\.bin, a pickle"):
        load_set(None, tmp_path, "set")  # type: ignore[arg-type]


CODE: list[tuple[str, Any]] = [
    ("auto_map", {"AutoConfig": "x.Y"}),
    ("auto_map", "x.Y"),
    ("trust_remote_code", True),
    ("trust_remote_code", "yes"),
    ("allow_remote_code", 1),
    ("custom_pipelines", {"a": {"impl": "x.Y"}}),
    ("custom_pipeline", "x"),
    ("_attn_implementation", "someone/kernel"),
    ("_attn_implementation", "kernels-community/flash:attention"),
    ("_attn_implementation", {"": "a/b"}),
    ("_attn_implementation", 3),
    ("_attn_implementation", ["sdpa"]),
    ("attn_implementation", "../x"),
    ("_attn_implementation_internal", "a/b"),
    ("_experts_implementation", "a/b@main"),
    ("model_class_path", "os.system"),
    ("import_path", "x"),
]


@pytest.mark.parametrize(("key", "value"), CODE)
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_keys_that_name_code_are_refused_at_any_depth(key: str, value: Any, depth: int, folder: Path) -> None:
    data: Any = {key: value}
    for level in range(depth):
        data = {"text_config": data} if level % 2 else {"parts": [data]}
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(UnsafeInputError, match=key):
        ModelFolder(folder)


def test_keys_that_name_no_code_are_not() -> None:
    plain = {"auto_map": None, "trust_remote_code": False, "_attn_implementation": "flash_attention_2"}
    check_config(
        {**plain, "attn_implementation": None, "_attn_implementation_internal": "sdpa"}, "config.json"
    )


@pytest.mark.parametrize(
    "text", ["NaN", "Infinity", "-Infinity", "1e400", "1" * 5000, "1" * 40, "-" + "9" * 17]
)
@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "rope_theta"])
def test_numbers_that_are_none(text: str, key: str, folder: Path) -> None:
    (folder / "config.json").write_text(f'{{"{key}": {text}}}')
    with pytest.raises(UnsafeInputError, match=r"config\.json"):
        ModelFolder(folder)


@pytest.mark.parametrize("value", [0, -1, -(2**40), 2**31, 2**40, 1.5, True, "32", [32], {"a": 1}, None])
@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
        "head_dim",
    ],
)
def test_sizes_that_the_weights_do_not_have(
    key: str, value: Any, saved: Callable[..., tuple[Any, Path]]
) -> None:
    """Before a rack is described: a model of a billion layers is never begun."""
    _, made = saved("llama")
    path = made / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    if key == "head_dim" and value is None:
        read_model(made)
        return
    with pytest.raises((ConfigError, InterchangeError)):
        read_model(made)


@pytest.mark.parametrize(
    ("key", "kind"), [("num_local_experts", "mixtral"), ("n_routed_experts", "deepseek_v3")]
)
def test_a_billion_experts_are_never_begun(
    key: str, kind: str, saved: Callable[..., tuple[Any, Path]]
) -> None:
    _, made = saved(kind)
    path = made / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: 2**30}))
    with pytest.raises(InterchangeError, match=r"experts, but the weights are 6. tensors"):
        read_model(made)


def test_a_model_that_does_not_fit_into_memory(
    saved: Callable[..., tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, made = saved("llama")
    monkeypatch.setattr("stackwise.interop.limits.memory_bytes", lambda: 100_000)
    with pytest.raises(InterchangeError, match=r"takes 0\.0 GB as float32, and this machine has"):
        read_model(made)


def test_weights_that_are_not_numbers_are_told_on_request(saved: Callable[..., tuple[Any, Path]]) -> None:
    model, made = saved("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    model.save_pretrained(made)
    read_model(made)
    with pytest.raises(InterchangeError, match=r"not finite numbers(.|\n)*blocks\.1\.ffn\.up\.weight"):
        read_model(made, check_finite=True)
