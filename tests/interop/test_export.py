"""What is exported computes the same in Transformers, and comes back to the last bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stackwise.cli.main import main
from stackwise.data.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, load_tokenizer
from stackwise.interop.errors import InterchangeError
from stackwise.interop.families import families
from stackwise.interop.hf_export import family_for, write_model
from stackwise.interop.hf_import import read_model
from stackwise.interop.shards import Group, write_shards
from stackwise.model.factory import create_rack_from_config, create_simple_rack
from stackwise.model.rack import Rack
from stackwise.training.adopt import adopt
from stackwise.training.run import train
from stackwise.training.stored import open_run

Saved = Callable[..., tuple[Any, Path]]
KINDS = list(families())
VOCAB = 320


def load(folder: Path, transformers: Any, kind: str = "AutoModelForCausalLM") -> Any:
    import stackwise.interop.transformers  # noqa: F401 - registers

    return getattr(transformers, kind).from_pretrained(folder).eval()


def auto_class(rack: Rack) -> str:
    return "AutoModelForCausalLM" if rack.is_causal else "AutoModelForMaskedLM"


def assert_same(one: Rack, other: Rack) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", ["auto", "stackwise"])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_the_same(
    kind: str, family: str, saved: Saved, tmp_path: Path, transformers: Any
) -> None:
    read = read_model(saved(kind)[1], stacks=2)
    written = write_model(read.rack, read.tokenizer, tmp_path / "out", family=family, config=read.config)
    assert written.family == (kind if family == "auto" else "stackwise")
    assert written.notes == []
    model = load(written.path, transformers, auto_class(read.rack))
    ids = torch.randint(0, VOCAB, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, read.rack(ids), atol=1e-5, rtol=1e-5)
    assert_same(read_model(written.path, stacks=None if family == "stackwise" else 2).rack, read.rack)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_a_file_of_any_format_comes_back_to_the_last_bit(
    kind: str, dtype: str, saved: Saved, tmp_path: Path
) -> None:
    _, folder = saved(kind, dtype=getattr(torch, dtype))
    read = read_model(folder)
    written = write_model(read.rack, read.tokenizer, tmp_path / "out", dtype=dtype, shard_bytes=20_000)
    assert len(written.files) > 2
    before = load_file(folder / "model.safetensors")
    after = {n: t for name in written.files[:-1] for n, t in load_file(written.path / name).items()}
    assert before.keys() == after.keys()
    if dtype == "float64":  # a rack computes in float32
        before = {name: tensor.float().double() for name, tensor in before.items()}
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_training_changed_is_what_is_written(
    tiny: Callable[..., Any], tmp_path: Path, transformers: Any
) -> None:
    config = tiny(model__norm="layernorm", model__bias=True, model__ffn_type="gelu_tanh", model__d_ff=64)
    config.model.pos_encoding = "learned"
    train(config, sinks=[])
    path = tmp_path / "runs" / "tiny"
    assert main(["export", str(path), "--to", "hf", "--max-shard-size", "0.00002"]) == 0
    opened = open_run(path)
    model = load(path / "hf", transformers)
    assert type(model).__name__ == "GPT2LMHeadModel"
    ids = torch.randint(0, opened.rack.spec.vocab_size, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, opened.rack(ids), atol=1e-5, rtol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path / "hf")
    assert tokenizer("To be, or not").input_ids == opened.tokenizer.encode("To be, or not")
    card = (path / "hf" / "README.md").read_text()
    assert f"| Steps | {opened.commit.step:,}, " in card
    assert "Held-out loss" in card
    assert str(tmp_path) not in card + (path / "hf" / "config.json").read_text()


def test_a_rack_of_no_family_describes_itself(tmp_path: Path, transformers: Any) -> None:
    rack = create_simple_rack(2, 2, 32, 64, 4, 300, attention_preset="gpt_style", short_conv=2, qk_norm=True)
    written = write_model(rack, ByteTokenizer(), tmp_path / "own")
    assert written.family == "stackwise"
    assert "short_conv of block 0 is 2, not 0" in written.notes[0]
    model = load(written.path, transformers)
    ids = torch.randint(0, 300, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, rack(ids), atol=1e-5, rtol=1e-5)
        mask = torch.ones_like(ids)
        mask[0, 20:] = 0
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, rack(ids, mask))
        loss = model(ids, labels=ids.clone()).loss
    model.save_pretrained(tmp_path / "again")
    assert_same(load(tmp_path / "again", transformers).rack, rack)
    wanted = torch.nn.functional.cross_entropy(rack(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)


def test_own_models_are_classifiers_too(tmp_path: Path, transformers: Any) -> None:
    rack = create_simple_rack(1, 2, 32, 64, 4, 300)
    write_model(rack, ByteTokenizer(), tmp_path / "own", family="stackwise")
    model = load(tmp_path / "own", transformers, "AutoModelForSequenceClassification")
    ids = torch.randint(0, 300, (2, 30))
    padded, mask = torch.cat((ids, ids[:, :5]), 1), torch.ones(2, 35)
    mask[:, 30:] = 0
    short, long = model(ids), model(padded, attention_mask=mask, labels=torch.tensor([0, 1]))
    torch.testing.assert_close(short.logits, long.logits, atol=1e-5, rtol=1e-5)
    assert short.logits.shape == (2, 2)
    long.loss.backward()
    assert model.score.weight.grad.abs().max() > 0


def test_fixed_tables_are_there_after_loading(
    tiny: Callable[..., Any], tmp_path: Path, transformers: Any
) -> None:
    config = tiny(model__pos_encoding="sinusoidal", model__vocab_size=300)
    rack = create_rack_from_config(config)
    write_model(rack, ByteTokenizer(), tmp_path / "own")
    ids = torch.randint(0, 300, (1, 20))
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "own", transformers)(ids).logits, rack(ids))


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), CharTokenizer("abc é\n", separated=True)])
def test_our_tokenizers_become_files_of_the_library(
    tokenizer: Tokenizer, tmp_path: Path, transformers: Any
) -> None:
    rack = create_simple_rack(1, 1, 16, 64, 2, tokenizer.vocab_size, attention_preset="gpt_style")
    write_model(rack, tokenizer, tmp_path / "own")
    text = "abc  cab\n\naé b"
    for read in (
        load_tokenizer(tmp_path / "own"),
        transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "own"),
    ):
        ids = read.encode(text)
        assert ids == tokenizer.encode(text)
        assert read.decode(ids) == text
        assert read.vocab_size in (
            tokenizer.vocab_size,
            tokenizer.vocab_size - 2,
        )  # with or without special ones
    assert (
        transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "own").eos_token_id
        == tokenizer.eos_id
    )


def test_frozen_formats_and_adapters_are_written_as_plain_weights(saved: Saved, tmp_path: Path) -> None:
    from stackwise.adapters.attach import attach
    from stackwise.model.spec import AdapterSpec
    from stackwise.precision.convert import freeze_stack

    read = read_model(saved("llama")[1], stacks=3)
    rack, plain = read.rack, read_model(saved("llama")[1], stacks=3).rack
    freeze_stack(rack.stacks[0], "nf4")
    attach(rack.stacks[1], AdapterSpec("stack", rank=2), seed=1)
    with torch.no_grad():
        for name, parameter in rack.stacks[1].named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    rack.spec = rack.spec.with_stacks([stack.spec for stack in rack.stacks])
    ids = torch.randint(0, VOCAB, (2, 20))
    folded = write_model(rack, read.tokenizer, tmp_path / "folded")
    assert folded.family == "llama"
    with torch.no_grad():
        wanted = rack(ids)
        torch.testing.assert_close(read_model(folded.path).rack(ids), wanted, atol=1e-4, rtol=1e-4)
        assert (wanted - plain(ids)).abs().max() > 0.01
    bare = read_model(write_model(rack, read.tokenizer, tmp_path / "bare", fold=False).path, stacks=3).rack
    held = bare.stacks[1].state_dict()
    assert all(torch.equal(held[n], t) for n, t in plain.stacks[1].state_dict().items())


def test_export_of_an_imported_run_keeps_its_format_and_settings(saved: Saved, tmp_path: Path) -> None:
    _, folder = saved("llama", dtype=torch.bfloat16)
    generation = {"eos_token_id": [2, 5], "do_sample": True, "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    path = adopt(read_model(folder), tmp_path / "run").path
    assert main(["export", str(path), "-o", str(tmp_path / "out")]) == 0
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == generation
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], config["eos_token_id"]) == ("bfloat16", 2)


def test_what_cannot_be_written(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read = read_model(saved("llama")[1])
    words = read.tokenizer
    with pytest.raises(InterchangeError, match="it is no gpt2"):
        write_model(read.rack, words, tmp_path / "out", family="gpt2")
    with pytest.raises(InterchangeError, match="did you mean 'llama'"):
        write_model(read.rack, words, tmp_path / "out", family="lama")
    with pytest.raises(InterchangeError, match="bfloat16"):
        write_model(read.rack, words, tmp_path / "out", dtype="bf16")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="--out"):
        write_model(read.rack, words, tmp_path / "out")
    path = adopt(read, tmp_path / "run").path
    assert main(["export", str(path), "--to", "onnx"]) == 2
    assert "it is hf" in capsys.readouterr().err


def test_an_interrupted_export_leaves_nothing(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = read_model(saved("llama")[1])

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stackwise.interop.hf_export.write_tokenizer", full)
    with pytest.raises(OSError, match="No space"):
        write_model(read.rack, read.tokenizer, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == []


def test_the_family_is_recognised_however_the_stacks_are_cut(saved: Saved) -> None:
    spec = read_model(saved("llama")[1], blocks_per_stack=2).rack.spec
    assert family_for(spec)[0] is families()["llama"]
    blocks = spec.stacks[0].blocks
    odd = spec.with_stacks(
        [replace(spec.stacks[0], blocks=(blocks[0], replace(blocks[1], qk_norm=True))), *spec.stacks[1:]]
    )
    family, _, reason = family_for(odd)
    assert family is None
    assert "qk_norm of block 1 is True, not False" in reason


def test_the_nearest_family_is_named_by_what_is_different(saved: Saved) -> None:
    def reason(**options: Any) -> str:
        made = create_simple_rack(1, 2, 32, 48, 4, 300, attention_preset="gpt_style", **options)
        family, _, text = family_for(made.spec)
        assert family is None
        return text

    assert reason(short_conv=2) == "it is no llama: short_conv of block 0 is 2, not 0"
    gpt2 = {"norm": "layernorm", "bias": True, "use_rope": False, "ffn_type": "gelu_tanh"}
    assert reason(**gpt2, softcap=3.0) == "it is no gpt2: softcap of block 0 is 3.0, not None"
    latent = {"q_rank": 0, "kv_rank": 8, "rope_dim": 4}
    text = reason(attention_type="mla", latent=latent)
    assert text.startswith(
        "it is no llama: attention_type of block 0 is mla, not mha; latent of block 0 is there, not missing"
    )
    spec = read_model(saved("deepseek_v3")[1]).rack.spec
    blocks = spec.stacks[0].blocks
    assert blocks[1].experts is not None
    blocks = (
        blocks[0],
        *(replace(b, experts=replace(b.experts, scale=3.0)) for b in blocks[1:2]),
        *blocks[2:],
    )
    text = family_for(spec.with_stacks([replace(spec.stacks[0], blocks=blocks)]))[2]
    assert text.startswith("it is no deepseek_v3: experts.scale of block ")


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_of_a_family_is_a_single_number(kind: str, saved: Saved) -> None:
    read = read_model(saved(kind)[1], stacks=1)
    assert min(tensor.dim() for tensor in read.rack.state_dict().values()) == 1


def test_a_file_with_a_single_number_holds_one_tensor_too_many(saved: Saved) -> None:
    _, folder = saved("llama")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.scale": torch.tensor(2.0)}, folder / "model.safetensors")
    with pytest.raises(InterchangeError, match=r"unknown +model\.scale \[\]"):
        read_model(folder)


def test_a_single_number_is_written_and_read_like_any_tensor(tmp_path: Path) -> None:
    value = torch.tensor(2.5)
    write_shards(tmp_path, [Group(("one",), ((),), (torch.bfloat16,), lambda: [value])], 100)
    held = load_file(tmp_path / "model.safetensors")["one"]
    assert held.shape == ()
    assert held == value


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks Transformers by an older name
@pytest.mark.parametrize(
    ("kind", "family", "method"),
    [
        ("llama", "auto", "lora"),
        ("llama", "auto", "dora"),
        ("gpt2", "auto", "lora"),
        ("modernbert", "auto", "lora"),
        ("llama", "stackwise", "lora"),
    ],
)
def test_adapters_are_written_as_peft_reads_them(
    kind: str, family: str, method: str, saved: Saved, tmp_path: Path, transformers: Any
) -> None:
    from peft import PeftModel

    from stackwise.adapters.attach import attach
    from stackwise.model.spec import AdapterSpec

    read = read_model(saved(kind)[1], stacks=3)
    rack = read.rack
    for stack, rank in ((rack.stacks[0], 2), (rack.stacks[2], 3)):
        attach(stack, AdapterSpec("mine", method, rank=rank, alpha=5.0), seed=1)
        with torch.no_grad():
            for name, parameter in stack.named_parameters():
                if "lora_B" in name or "magnitude" in name:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
    rack.spec = rack.spec.with_stacks([stack.spec for stack in rack.stacks])
    rack.eval()
    out = write_model(rack, read.tokenizer, tmp_path / "out", fold=False, family=family, config=read.config)
    assert "adapters/mine" in out.files
    base = load(out.path, transformers, auto_class(rack))
    model = PeftModel.from_pretrained(base, out.path / "adapters" / "mine").eval()
    ids = torch.randint(0, VOCAB, (2, 20))
    with torch.no_grad():
        wanted = rack(ids)
        torch.testing.assert_close(model(input_ids=ids).logits, wanted, atol=1e-4, rtol=1e-4)
        with model.disable_adapter():
            assert (model(input_ids=ids).logits - wanted).abs().max() > 0.01


def test_sets_that_peft_cannot_load(saved: Saved, tmp_path: Path) -> None:
    from stackwise.adapters.attach import attach
    from stackwise.model.spec import AdapterSpec

    for kind, spec, words in (
        ("llama", AdapterSpec("mine", "bottleneck", rank=2), "PEFT does not know"),
        ("mixtral", AdapterSpec("mine", rank=2), "sits on experts"),
    ):
        read = read_model(saved(kind)[1], stacks=1)
        attach(read.rack.stacks[0], spec, seed=1)
        read.rack.spec = read.rack.spec.with_stacks([stack.spec for stack in read.rack.stacks])
        with pytest.raises(InterchangeError, match=words):
            write_model(read.rack, read.tokenizer, tmp_path / "out", fold=False)
        assert not (tmp_path / "out").exists()
