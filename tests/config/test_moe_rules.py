"""Where experts are, without going through the layers one by one: a layer count is a number somebody may mistype."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackwise.config.errors import ConfigError
from stackwise.config.moe_rules import _next_with_experts
from stackwise.config.root import StackWiseConfig
from stackwise.model.moe_settings import MoeSettings


@given(st.integers(1, 7), st.integers(0, 9), st.integers(0, 30))
def test_the_next_layer_with_experts_is_the_first_that_has_them(every, first_dense, layer):
    moe = MoeSettings(n_experts=2, every=every, first_dense=first_dense)
    assert _next_with_experts(moe, layer) == next(at for at in range(layer, 99) if moe.at(at))


def test_huge_numbers_are_answered_at_once():
    moe = {"n_experts": 10**15 + 1, "top_k": 2, "groups": 10**15, "first_dense": 10**15, "every": 10**12}
    with pytest.raises(ConfigError) as caught:
        StackWiseConfig.from_dict({"model": {"moe": moe}}).validate()
    assert {problem.key for problem in caught.value.problems} >= {"model.moe.groups", "model.moe.first_dense"}
