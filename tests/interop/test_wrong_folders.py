"""What is wrong with a model folder is told by name, before anything is made of it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stackwise.config.errors import ConfigError
from stackwise.data.tokenizers import train_bpe
from stackwise.interop.errors import InterchangeError
from stackwise.interop.hf_import import read_model
from stackwise.storage.errors import DamagedFileError, UnsafeInputError

SLIDING, FULL = "sliding_attention", "full_attention"
Saved = Callable[..., tuple[Any, Path]]


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("kind", "key", "value", "hint"),
    [
        ("gpt2", "activation_function", "relu", "gelu_new"),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True, "False"),
        ("gpt2", "add_cross_attention", True, "False"),
        ("llama", "hidden_act", "gelu", "silu"),
        ("llama", "mlp_bias", "yes", "true or false"),
        ("llama", "query_layernorm", True, "may change the model"),
        ("llama", "quantization_config", {"bits": 4}, "unquantised"),
        ("llama", "hidden_size", "wide", "hidden_size"),
        ("llama", "num_key_value_heads", 3, "must divide"),
        ("bert", "tie_word_embeddings", False, "True"),
        ("qwen3", "layer_types", ["linear_attention"] * 3, "full_attention"),
        ("deepseek_v3", "v_head_dim", 12, "qk_nope_head_dim"),
        ("deepseek_v3", "scoring_func", "softmax", "sigmoid"),
        ("llama", "rope_scaling", {"rope_type": "spiral", "factor": 2.0}, "something else"),
        ("llama", "rope_parameters", {"rope_type": "spiral", "rope_theta": 1e4}, "longrope"),
        ("llama", "rope_parameters", {"rope_type": "linear", "factor": 2.0, "swirl": 1}, "swirl"),
        ("llama", "rope_parameters", "linear", "a map"),
        ("modernbert", "layer_types", [SLIDING, SLIDING, FULL, FULL, SLIDING], "no pattern"),
        ("modernbert", "local_attention", 7, "even"),
        ("modernbert", "rope_parameters", {"rope_type": "default"}, "map of maps"),
        ("llama", "num_hidden_layers", 0, "at least 1"),
        ("gemma", "hidden_act", "silu", "gelu_pytorch_tanh"),
        ("gemma2", "attn_logit_softcapping", None, "is missing"),
        ("gemma3_text", "attn_logit_softcapping", 50.0, "None"),
        ("gemma3_text", "query_pre_attn_scalar", 12.5, "positive integer"),
        ("gemma3_text", "use_bidirectional_attention", True, "False"),
        ("gemma3_text", "rope_parameters", {"rope_type": "default"}, "map of maps"),
        (
            "gemma3_text",
            "rope_parameters",
            {SLIDING: {"rope_type": "linear", "factor": 2.0}},
            "sliding_attention",
        ),
    ],
)
def test_keys_that_are_not_understood(kind: str, key: str, value: Any, hint: str, saved: Saved) -> None:
    _, folder = saved(kind)
    change_config(folder, **{key: value})
    with pytest.raises(ConfigError, match=hint) as caught:
        read_model(folder)
    assert key in str(caught.value) or key in ("num_hidden_layers", "rope_parameters")


def test_a_missing_key_is_named(saved: Saved) -> None:
    _, folder = saved("llama")
    config = json.loads((folder / "config.json").read_text())
    del config["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="hidden_size"):
        read_model(folder)


def test_tensors_that_are_missing_unknown_or_of_another_shape_are_all_listed(saved: Saved) -> None:
    _, folder = saved("llama")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.norm.weight"] = torch.ones(7)
        tensors["model.layers.0.mlp.router.weight"] = torch.ones(4, 32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)

    change_tensors(folder, spoil)
    with pytest.raises(InterchangeError) as caught:
        read_model(folder)
    text = str(caught.value)
    assert "missing     model.layers.1.mlp.up_proj.weight [48, 32]" in text
    assert "wrong shape model.norm.weight [7], needed [32]" in text
    assert "unknown     model.layers.0.mlp.router.weight [4, 32]" in text
    assert "lm_head.weight is I8" in text


def test_a_long_list_of_tensors_is_cut(saved: Saved) -> None:
    _, folder = saved("llama")
    change_config(folder, num_hidden_layers=9)
    with pytest.raises(InterchangeError, match="and 42 more"):
        read_model(folder)


def test_a_tied_head_of_its_own_is_refused(saved: Saved) -> None:
    _, folder = saved("llama")
    change_config(folder, tie_word_embeddings=True)
    with pytest.raises(InterchangeError, match="tie_word_embeddings"):
        read_model(folder)
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert read_model(folder).rack.is_tied


def test_buffers_of_older_files_are_passed_over(saved: Saved) -> None:
    _, folder = saved("gpt2")
    before = read_model(folder).rack.state_dict()
    change_tensors(folder, lambda t: t.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 128, 128)}))
    after = read_model(folder).rack.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_pickle_is_never_opened(saved: Saved, tmp_path: Path) -> None:
    _, folder = saved("gpt2")
    (folder / "model.safetensors").unlink()

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UnsafeInputError, match=r"pytorch_model\.bin, a pickle"):
        read_model(folder)
    assert not (tmp_path / "sprung").exists()


def test_code_of_the_folder_is_never_run(saved: Saved, tmp_path: Path) -> None:
    _, folder = saved("llama")
    sprung = tmp_path / "sprung"
    (folder / "modeling_llama.py").write_text(f"import pathlib; pathlib.Path({str(sprung)!r}).touch()")
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_llama.Model"})
    with pytest.raises(UnsafeInputError, match="auto_map"):
        read_model(folder)
    assert not sprung.exists()


def test_other_families_and_heads_are_refused(saved: Saved) -> None:
    _, folder = saved("llama")
    change_config(folder, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(InterchangeError, match="LlamaForCausalLM"):
        read_model(folder)
    change_config(folder, model_type="lama")
    with pytest.raises(InterchangeError, match="did you mean 'llama'"):
        read_model(folder)


def test_folders_without_the_files(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model folder"):
        read_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        read_model(tmp_path)
    _, folder = saved("llama", shard="20KB")
    shard = sorted(folder.glob("*.safetensors"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[:-5])
    with pytest.raises(DamagedFileError, match=shard.name):
        read_model(folder)
    shard.unlink()
    with pytest.raises(InterchangeError, match=shard.name):
        read_model(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(shard.name, "../" + shard.name))
    with pytest.raises(UnsafeInputError, match="no file of the folder"):
        read_model(folder)
    index.unlink()
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(InterchangeError, match="no weights"):
        read_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(DamagedFileError, match="not JSON"):
        read_model(folder)


def test_tokenizers_that_do_not_belong(saved: Saved, tmp_path: Path) -> None:
    _, folder = saved("llama")
    text = ["".join(chr(97 + (i * i * j) % 26) for i in range(400)) for j in range(30)]
    train_bpe(text, 400).save(folder / "tokenizer.json")
    with pytest.raises(InterchangeError, match="400 ids and the embedding 320 rows"):
        read_model(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InterchangeError, match="tokenizer"):
        read_model(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InterchangeError, match="--tokenizer"):
        read_model(folder)
    assert read_model(folder, tokenizer="byte").tokenizer.name == "byte"


@pytest.mark.parametrize(
    "asked", [{"stacks": 4}, {"stacks": 0}, {"blocks_per_stack": 4}, {"stacks": 1, "blocks_per_stack": 3}]
)
def test_cuts_that_cannot_be_made(asked: dict[str, int], saved: Saved) -> None:
    _, folder = saved("llama")
    with pytest.raises(ConfigError, match=r"--stacks|--blocks-per-stack"):
        read_model(folder, **asked)
