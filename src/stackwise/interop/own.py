"""The self-describing form of a rack that equals no family: its description in config.json, its tensors by name."""

from __future__ import annotations

from typing import Any

from stackwise.config.root import StackWiseConfig
from stackwise.interop.errors import InterchangeError
from stackwise.model.spec import RackSpec

MODEL_TYPE = "stackwise"
PREFIX = "rack."
"""What the names of the tensors begin with: the model of Transformers holds the rack under this name."""
CAUSAL, MASKED = "StackWiseForCausalLM", "StackWiseForMaskedLM"
SECTIONS = ("model", "objective", "generation")
"""Of the run's configuration, what a model is described by; the others speak of its training and its text."""


def own_config(spec: RackSpec, config: StackWiseConfig | None) -> dict[str, Any]:
    """The config.json of a rack. `config` is that of its run, from which another run of its kind can be set up."""
    first = spec.blocks[0]
    data: dict[str, Any] = {
        "model_type": MODEL_TYPE,
        "architectures": [CAUSAL if spec.is_causal else MASKED],
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.d_model,
        "num_hidden_layers": len(spec.blocks),
        "num_attention_heads": first.n_heads,
        "max_position_embeddings": spec.max_seq_len,
        "tie_word_embeddings": spec.tied,
        "rack": spec.to_dict(),
    }
    if config is not None:
        plain = config.to_dict()
        progressive = plain["training"]["progressive"]
        data["stackwise"] = {name: plain[name] for name in SECTIONS} | {
            "training": {"seq_len": plain["training"]["seq_len"], "progressive": progressive}
        }
    return data


def read_own(data: dict[str, Any], where: str) -> tuple[RackSpec, StackWiseConfig]:
    """Description and configuration of an `own_config`; InterchangeError where they are not whole."""
    try:
        spec = RackSpec.from_dict(data["rack"])
        config = StackWiseConfig.from_dict(data["stackwise"])
    except KeyError as error:
        raise InterchangeError(f"{where} lacks {error}, so it describes no rack") from None
    except (TypeError, ValueError) as error:
        raise InterchangeError(f"{where} describes no rack that this version knows: {error}") from None
    config.model.vocab_size = spec.vocab_size
    return spec, config
