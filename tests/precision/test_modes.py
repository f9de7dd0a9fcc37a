"""Precision modes by name, and the manager that sets them."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

from stackwise import ConfigError, PrecisionManager, Stack, create_simple_rack
from stackwise.precision import manager as manager_module
from stackwise.precision.convert import linear_layers
from stackwise.precision.formats import FORMATS
from stackwise.precision.frozen_linear import FrozenLinear
from stackwise.precision.modes import MODES, check_compute, frozen_format, mode_of
from stackwise.precision.settings import PrecisionKeys

TABLE = {
    "full": ("float32", "fp32"),
    "half": ("float16", "fp16"),
    "bfloat16": ("bfloat16", "bf16"),
    "fp8": ("bfloat16", "fp8"),
    "nvfp4": ("bfloat16", "nvfp4"),
    "nf4": ("bfloat16", "nf4"),
    "qlora": ("bfloat16", "nf4"),
}
ON_CPU = [name for name in MODES if name != "half"]


def stack() -> Stack:
    return create_simple_rack(1, 1, 32, 64, 4, 50).stacks[0]


def keys(**values: object) -> PrecisionKeys:
    return PrecisionKeys(**values)


def test_the_table_of_modes() -> None:
    assert {name: (mode.compute_dtype, mode.weight_format) for name, mode in MODES.items()} == TABLE
    assert {mode.weight_format for mode in MODES.values()} == set(FORMATS)
    assert [name for name, mode in MODES.items() if mode.adapters] == ["qlora"]


@pytest.mark.parametrize("name", ["fp4", "nf_fp8"])
def test_names_that_people_look_for_get_a_hint(name: str) -> None:
    for ask in (mode_of, lambda n: PrecisionManager("cpu").set_stack_precision(stack(), n)):
        with pytest.raises(ValueError, match=r"known: full, half, .*; the 4-bit formats are nvfp4 and nf4"):
            ask(name)
    for key in ("trunk_precision", "new_stack_precision"):
        with pytest.raises(ConfigError, match=rf"{key}: .*nvfp4 and nf4, got '{name}'; allowed: f"):
            keys(**{key: name})


def test_an_unknown_mode_is_an_error_with_the_list_and_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"unknown precision 'int3'; known: full, half, bfloat16, fp8, nvfp4, nf4, qlora$"
    ):
        mode_of("int3")
    with pytest.raises(ValueError, match=r"did you mean 'half'\?"):
        mode_of("haf")
    with pytest.raises(
        ConfigError, match=r"new_stack_precision: wrong value, got 'float16'; allowed: full, .*'bfloat16'"
    ):
        keys(new_stack_precision="float16")
    with pytest.raises(ConfigError, match=r"trunk_precision: wrong value, got 'NF4'.*did you mean 'nf4'\?"):
        keys(trunk_precision="NF4")


def test_half_precision_is_refused_on_a_cpu_with_the_reason_and_taken_elsewhere() -> None:
    with pytest.raises(
        ConfigError, match=r"no float16 arithmetic.*got 'half'; allowed: full, bfloat16, .*trunk_precision"
    ):
        check_compute(mode_of("half"), "cpu")
    check_compute(mode_of("half"), "cuda")
    for name in ON_CPU:
        check_compute(mode_of(name), "cpu")
    own = stack()
    with pytest.raises(ValueError, match="no float16 arithmetic"):
        PrecisionManager("cpu").set_stack_precision(own, "half")
    with pytest.raises(ValueError, match="no float16 arithmetic"):
        PrecisionManager("cpu").autocast("half")
    assert (own.compute_dtype, own.weight_format) == (None, "fp32")


def test_the_format_of_the_trunk() -> None:
    # what is chosen wins, then the mode's own; a stack without a mode follows the run, in full precision on the CPU
    assert frozen_format(keys(trunk_precision="fp8"), "nf4") == "fp8"
    assert frozen_format(keys(), "nvfp4") == "nvfp4"
    assert frozen_format(keys(), None, "bfloat16", "cpu") == "fp32"
    assert frozen_format(keys(), None, "bfloat16", "cuda") == "bf16"
    assert frozen_format(keys(), None, "float16", "cuda") == "fp16"
    assert frozen_format(keys(), None, "float32", "cuda") == "fp32"
    assert frozen_format(keys(trunk_precision="nf4"), None, "bfloat16", "cuda") == "nf4"
    assert (
        frozen_format(keys(trunk_precision="fp8"), "qlora") == "nf4"
    )  # the base is stored before anything trains


@pytest.mark.parametrize("name", [name for name in ON_CPU if name != "qlora"])
def test_a_stack_trains_on_fp32_weights_and_freezes_to_its_format(name: str) -> None:
    rack = create_simple_rack(2, 1, 32, 64, 4, 50, tie_embeddings=False)
    own, manager = rack.stacks[0], PrecisionManager("cpu")
    mode = manager.set_stack_precision(own, name)
    assert (own.compute_dtype, own.weight_format) == (TABLE[name][0], "fp32")
    optimizer = torch.optim.AdamW(rack.parameters(), lr=1e-2)
    seen: list[torch.dtype] = []
    linear_layers(own)["blocks.0.ffn.down"].register_forward_hook(lambda m, x, y: seen.append(y.dtype))
    loss = rack(torch.randint(0, 50, (2, 9))).square().mean()
    loss.backward()
    optimizer.step()
    assert seen == [getattr(torch, TABLE[name][0])]
    assert torch.isfinite(loss)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in own.parameters())  # type: ignore[union-attr]
    manager.freeze(own, name)
    assert own.weight_format == mode.weight_format == TABLE[name][1]
    frozen = [isinstance(layer, FrozenLinear) for layer in linear_layers(own).values()]
    assert frozen == [name != "full"] * 7
    assert torch.isfinite(rack(torch.randint(0, 50, (2, 9)))).all()


def test_a_frozen_stack_is_stored_at_once() -> None:
    own = stack()
    own.freeze_all()
    PrecisionManager("cpu").set_stack_precision(own, "nf4")
    assert (own.compute_dtype, own.weight_format) == ("bfloat16", "nf4")
    with pytest.raises(ValueError, match="stored as nf4 and cannot be stored as fp8"):
        PrecisionManager("cpu").set_stack_precision(own, "fp8")
    assert own.compute_dtype == "bfloat16"


def test_qlora_stores_the_base_at_birth_and_says_once_what_it_is() -> None:
    manager_module.note_qlora.cache_clear()
    stacks = [stack(), stack()]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for own in stacks:
            PrecisionManager("cpu").set_stack_precision(own, "qlora")
    assert [own.weight_format for own in stacks] == ["nf4", "nf4"]
    assert not any(p.requires_grad for own in stacks for p in own.parameters())
    (warning,) = said
    assert "shorthand for bfloat16 over a base stored as nf4" in str(warning.message)


def test_to_half_and_to_full() -> None:
    own, manager = stack(), PrecisionManager("cpu")
    before = {name: layer.weight.detach().clone() for name, layer in linear_layers(own).items()}
    manager.to_half(own)
    assert own.weight_format == "fp16"
    assert own.compute_dtype is None
    manager.to_full(own)
    assert (own.weight_format, own.compute_dtype) == ("fp32", "float32")
    for name, layer in linear_layers(own).items():
        assert torch.equal(layer.weight, before[name].half().float())
        assert layer.weight.dtype == torch.float32


@pytest.mark.parametrize("name", ON_CPU)
def test_autocast_computes_in_the_dtype_of_the_mode(name: str) -> None:
    layer, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
    with PrecisionManager("cpu").autocast(name):
        assert layer(x).dtype == getattr(torch, TABLE[name][0])
    with torch.autocast("cpu", torch.bfloat16), PrecisionManager("cpu").autocast("full"):
        assert layer(x).dtype == torch.float32
    with pytest.raises(ValueError, match="unknown precision 'fast'"):
        PrecisionManager("cpu").autocast("fast")


def test_settings_and_modes_do_not_import_torch() -> None:
    code = "import sys, stackwise.precision.modes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
