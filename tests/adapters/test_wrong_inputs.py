"""What the adapters refuse, and how they say it."""

from __future__ import annotations

import sys

import pytest

from stackwise.adapters.attach import adapter_parameters, attach, remove
from stackwise.adapters.merge import fold, merge, unmerge
from stackwise.adapters.package import MissingPackageError, adapted_linear
from stackwise.cli.errors import USAGE, exit_code, explain
from stackwise.model.spec import AdapterSpec


def test_a_name_can_be_used_once(rack):
    attach(rack.stacks[0], AdapterSpec("stack"))
    with pytest.raises(
        ValueError, match="stack 's0' has an adapter set 'stack' already; fold it in with merge_lora"
    ):
        attach(rack.stacks[0], AdapterSpec("stack", "mora"))
    attach(rack.stacks[1], AdapterSpec("stack"))


@pytest.mark.parametrize("name", ["keys", "train", "type"])
def test_words_of_pytorch_are_no_names(rack, name):
    with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
        attach(rack.stacks[0], AdapterSpec(name))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "gat",
            "matches no linear layer of stack 's0'; known: all-linear, q, k, v, o, gate, up, down, paths such as",
        ),
        ("gat", "did you mean 'gate'"),
        ("all_linear", "did you mean 'all-linear'"),
        ("norm", "matches no linear layer"),
        ("attn", "matches no linear layer"),
        ("(q", "is no regular expression"),
    ],
)
def test_a_target_that_matches_nothing_is_refused_and_nothing_is_attached(rack, target, message):
    names = list(rack.state_dict())
    with pytest.raises(ValueError) as caught:
        attach(rack.stacks[0], AdapterSpec("stack", targets=("q", target)))
    assert message in str(caught.value)
    assert list(rack.state_dict()) == names
    assert rack.stacks[0].adapters == ()


@pytest.mark.parametrize("act", [merge, unmerge, fold, remove])
def test_a_set_that_is_not_there(rack, act):
    attach(rack.stacks[0], AdapterSpec("stack"))
    with pytest.raises(ValueError, match="stack 's0' has no adapter set 'trunk'; it has stack"):
        act(rack.stacks[0], "trunk")
    with pytest.raises(ValueError, match="stack 's1' has no adapter set 'stack'; it has none"):
        act(rack.stacks[1], "stack")
    assert adapter_parameters(rack.stacks[0])


def test_without_peft_the_error_names_the_extra(rack, monkeypatch):
    adapted_linear.cache_clear()
    monkeypatch.delitem(sys.modules, "stackwise.adapters.layer", raising=False)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingPackageError) as caught:
        attach(rack.stacks[0], AdapterSpec("stack"))
    said = explain(caught.value)
    assert said.startswith("error: adapters need the package peft, ")
    assert said.endswith('pip install "stackwise[adapters]"')
    assert exit_code(caught.value) == USAGE
    monkeypatch.undo()
    adapted_linear.cache_clear()
