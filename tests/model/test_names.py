"""Names of parameters where adapters sit on a layer."""

import pytest
import torch
from torch import nn

from stackwise.model.names import PlainNames, adapter_set_of, plain_name, set_modules
from stackwise.model.spec import AdapterSpec, RackSpec, StackSpec

Q = "stacks.s0.blocks.1.attn.q"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"{Q}.lora_A.stack.weight", "stack"),
        (f"{Q}.lora_magnitude_vector.trunk.weight", "trunk"),
        ("lora_bottleneck.own-1.down.bias", "own-1"),
        (f"{Q}.base_layer.weight", None),
        (f"{Q}.weight", None),
        ("embedding.weight", None),
    ],
)
def test_the_set_of_a_parameter_is_read_from_its_name(name: str, expected: str | None) -> None:
    assert adapter_set_of(name) == expected


def test_plain_names_leave_the_base_layer_out() -> None:
    assert plain_name(f"{Q}.base_layer.weight") == f"{Q}.weight"
    assert plain_name("base_layer.weight") == "weight"
    assert plain_name(f"{Q}.lora_A.stack.weight") == f"{Q}.lora_A.stack.weight"
    assert plain_name("my_base_layer.weight") == "my_base_layer.weight"


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(2, 2)
        self.base_layer.register_buffer("scale", torch.ones(1))
        self.lora_A = nn.ModuleDict({"stack": nn.Linear(2, 1), "trunk": nn.Linear(2, 1)})
        self.lora_dropout = nn.ModuleDict({"stack": nn.Dropout(0.1)})


class Owner(PlainNames):
    def __init__(self) -> None:
        super().__init__()
        self.q = Wrapped()


def test_parameters_and_buffers_of_a_rack_go_by_plain_names() -> None:
    owner = Owner()
    assert [name for name, _ in owner.named_parameters()][:2] == ["q.weight", "q.bias"]
    assert [name for name, _ in owner.named_buffers("x")] == ["x.q.scale"]
    assert len(list(owner.parameters())) == 6


def test_the_modules_of_a_set_are_found_by_its_name() -> None:
    owner = Owner()
    assert set_modules(owner, "stack") == [owner.q.lora_A["stack"], owner.q.lora_dropout["stack"]]
    assert set_modules(owner, "trunk") == [owner.q.lora_A["trunk"]]
    assert set_modules(owner, "q") == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank": 0}, "at least 1, got 0"),
        ({"alpha": 0.0}, "above 0, got 0"),
        ({"dropout": 1.0}, r"\[0, 1\), got 1"),
        ({"method": "loar"}, "known: lora, dora, mora, bottleneck; did you mean 'lora'"),
        ({"name": "a.b"}, "letters, digits"),
        ({"targets": ()}, "needs targets"),
    ],
)
def test_a_wrong_adapter_spec_is_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdapterSpec(**{"name": "stack", **wrong})


def test_adapter_specs_survive_a_dict() -> None:
    from dataclasses import asdict

    from stackwise.model.block_spec import BlockSpec

    sets = (AdapterSpec("stack", "dora", 8, 4.0, 0.1, ("q", "v"), True), AdapterSpec("trunk"))
    stack = StackSpec("s0", (BlockSpec(16, 2),), weight_format="nf4", adapters=sets)
    spec = RackSpec(17, 16, (stack,))
    assert RackSpec.from_dict(asdict(spec)) == spec
