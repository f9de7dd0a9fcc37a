"""A linear layer with named adapter sets, on top of PEFT's.

PEFT makes, names, activates and removes the sets, and brings LoRA and DoRA. Ours is what it does not do:

- methods of our own (MoRA, bottleneck);
- several sets of any method in any order: each adds to the output of the base layer alone. PEFT lets a DoRA set scale
  what earlier sets added, in eval mode only, so its result depends on order and mode;
- some sets merged and others not: PEFT leaves the others out of the forward pass;
- a base in a frozen format: PEFT would add a change to a temporary copy of the weight;
- fp32 inside whatever autocast says, without an fp32 copy of the input (see `low_rank`);
- plain names in `state_dict` (see `model.names`).

This module imports PEFT, which takes seconds: import it inside functions only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from stackwise.adapters.bottleneck import Bottleneck
from stackwise.adapters.low_rank import low_rank
from stackwise.adapters.mora import Mora
from stackwise.kernels.linear import linear
from stackwise.model.linear import matrix_of


@dataclass
class SetConfig(LoraConfig):
    """PEFT's configuration and the method, for which PEFT has no field."""

    method: str = "lora"


OWN: dict[str, Callable[[int, int, int], nn.Module]] = {
    "mora": Mora,
    "bottleneck": lambda n_in, n_out, rank: Bottleneck(n_out, rank),
}
"""Method -> its module, from (in_features, out_features, rank)."""


class AdaptedLinear(PeftLinear):
    """y = W x + b + sum of the changes of all active sets; bottleneck sets come last, on that sum."""

    merged_weight: Tensor | None

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SetConfig, **options: Any) -> None:
        super().__init__(base_layer, adapter_name, config, **options)
        self.register_buffer("merged_weight", None, persistent=False)
        self.register_state_dict_post_hook(_hide_base)
        self.register_load_state_dict_pre_hook(_find_base)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features  # type: ignore[return-value]

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """To where the base is, in fp32 (fp64 on an fp64 base). PEFT would unpack a frozen base to ask it."""
        base = next(iter([*self.base_layer.parameters(), *self.base_layer.buffers()]))
        place = base.device if device is None else device
        dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
        for container in dict.fromkeys(self.adapter_layer_names):
            added: Any = getattr(self, container)
            if adapter_name in added and any(
                (p.device, p.dtype) != (place, dtype) for p in added[adapter_name].parameters()
            ):
                added[adapter_name].to(place, dtype)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Which sets are active. Unlike PEFT's this turns no gradient on or off: what trains is the stage's matter."""
        self._active_adapter = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)

    def update_layer(  # type: ignore[override]  # our sets come with a SetConfig
        self, adapter_name: str, r: int, lora_alpha: float, config: SetConfig, **options: Any
    ) -> None:
        """Add a set."""
        if config.method not in OWN:
            super().update_layer(adapter_name, r, lora_alpha, config=config, **options)  # type: ignore[arg-type]
            return
        container = f"lora_{config.method}"
        if not hasattr(self, container):
            setattr(self, container, nn.ModuleDict())
            self.adapter_layer_names = (*self.adapter_layer_names, container)
        self.r[adapter_name], self.lora_alpha[adapter_name], self.scaling[adapter_name] = r, lora_alpha, 1.0
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_dropout[adapter_name] = dropout
        getattr(self, container)[adapter_name] = OWN[config.method](
            *self._get_in_out_features(self.base_layer), r
        )
        self._move_adapter_to_device_of_base_layer(adapter_name)

    # --- forward -----------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        base = self._base(x)
        names = [n for n in self.active_adapters if n not in self.merged_adapters]
        if not names or self.disable_adapters:
            return base
        kind, y = x.device.type, base
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            last = [name for name in names if name in self._own("bottleneck")]
            for name in names:
                if name not in last:
                    y = y + self._change(name, x, base)
            h = y
            for name in last:
                bottleneck: Any = self._own("bottleneck")[name]
                y = y + bottleneck(self.lora_dropout[name](h.to(bottleneck.up.weight.dtype)))
        return y.to(base.dtype)

    def _base(self, x: Tensor) -> Tensor:
        if self.merged_weight is None or self.disable_adapters:
            base: Tensor = self.base_layer(x)
            return base
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.base_layer.parameters()):
            raise RuntimeError(
                f"the adapter sets {', '.join(self.merged_adapters)} are merged, so the base weight cannot train; "
                "call unmerge first, or fold the sets in for good with fold or merge_lora"
            )
        bias: Any = self.base_layer.bias
        return linear(x, self.merged_weight, bias)

    def matrix(self) -> Tensor | None:
        """What the input is multiplied with; null while sets that are not merged add to it."""
        if self.disable_adapters:
            return matrix_of(self.base_layer)
        if any(n not in self.merged_adapters for n in self.active_adapters if self.method_of(n) is not None):
            return None
        return matrix_of(self.base_layer) if self.merged_weight is None else self.merged_weight

    def _change(self, name: str, x: Tensor, base: Tensor) -> Tensor:
        """What a set adds to the output, in the set's dtype. `base`: the output without any set."""
        dropout = self.lora_dropout[name]
        x = dropout(x)
        if name in self._own("mora"):
            mora: Any = self._own("mora")[name]
            return mora(x.to(mora.weight.dtype))
        a: Any = self.lora_A[name]
        b: Any = self.lora_B[name]
        if name not in self.lora_variant:
            return low_rank(x, a.weight, b.weight, self.scaling[name])
        dropped = isinstance(dropout, nn.Dropout) and dropout.training
        change: Tensor = self.lora_magnitude_vector[name](
            x.to(a.weight.dtype),
            lora_A=a,
            lora_B=b,
            scaling=self.scaling[name],
            base_layer=self.base_layer,
            base_result=None if dropped or self.merged_weight is not None else base,
            adapter_name=name,
        )
        return change

    def _own(self, method: str) -> nn.ModuleDict | dict[str, nn.Module]:
        return getattr(self, f"lora_{method}", {})

    # --- merging -----------------------------------------------------------------------------------------------

    def method_of(self, name: str) -> str | None:
        """How the set of this name changes the layer; None where the layer has no such set."""
        own = next((method for method in OWN if name in self._own(method)), None)
        return own or ("dora" if name in self.lora_variant else "lora" if name in self.lora_A else None)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """The change of the weight [O, I] that a set makes on the base weight as it is. Bottlenecks: ValueError."""
        method = self.method_of(adapter)
        if method == "mora":
            mora: Any = self._own("mora")[adapter]
            return mora.delta_weight()
        if method == "bottleneck":
            raise ValueError(
                f"the bottleneck set {adapter!r} is not linear and cannot be merged into a weight; keep it attached"
            )
        delta: Tensor = super().get_delta_weight(adapter)
        if method == "lora":
            return delta
        weight = self.base_weight().to(delta.dtype)
        changed = weight + delta
        dora: Any = self.lora_magnitude_vector[adapter]
        return (dora.weight / changed.norm(dim=1)).unsqueeze(1) * changed - weight

    def base_weight(self) -> Tensor:
        """The weight [O, I] of the base layer in plain numbers, whatever format it is stored in."""
        layer: Any = self.base_layer
        return layer.weight.detach()

    @torch.no_grad()
    def weight_with(self, names: Sequence[str]) -> Tensor:
        """Base weight plus the changes of these sets, a new tensor [O, I]. Numbers that are not finite: ValueError."""
        weight = self.base_weight().clone()
        for name in names:
            delta = self.get_delta_weight(name)
            weight = weight.to(torch.promote_types(weight.dtype, delta.dtype)) + delta
        if not weight.is_meta and not torch.isfinite(weight).all():
            raise ValueError(
                f"merging {', '.join(names)} gives numbers that are not finite; the set is broken"
            )
        return weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Compute with one matrix that holds these sets (null: all) until `unmerge`; base and sets stay as they are."""
        names = list(self.active_adapters) if adapter_names is None else adapter_names
        wanted = [*self.merged_adapters]
        wanted += [n for n in names if self.method_of(n) is not None and n not in wanted]
        if wanted != self.merged_adapters:
            self._hold_merged(wanted)

    def unmerge(self, adapter_names: list[str] | None = None) -> None:
        """Take these sets (null: all) out again."""
        left = [n for n in self.merged_adapters if adapter_names is not None and n not in adapter_names]
        if left != self.merged_adapters:
            self._hold_merged(left)

    def _hold_merged(self, names: list[str]) -> None:
        self.merged_weight = self.weight_with(names) if names else None
        self.merged_adapters = names


def _hide_base(layer: nn.Module, tensors: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """State dict hook: tensors of the base layer go by their plain names. The order stays."""
    inner = f"{prefix}base_layer."
    for name in [n for n in tensors if n.startswith(prefix)]:
        plain = prefix + name.removeprefix(inner) if name.startswith(inner) else name
        tensors[plain] = tensors.pop(name)


def _find_base(layer: nn.Module, tensors: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load hook: the reverse of `_hide_base`. What belongs to no set belongs to the base layer."""
    own = tuple(f"{prefix}{name}." for name, _ in layer.named_children())
    for name in [n for n in tensors if n.startswith(prefix) and not n.startswith(own)]:
        tensors[f"{prefix}base_layer.{name.removeprefix(prefix)}"] = tensors.pop(name)
