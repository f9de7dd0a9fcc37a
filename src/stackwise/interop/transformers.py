"""Self-describing StackWise models in Transformers. Importing this module makes them known to its Auto classes.

    import stackwise.interop.transformers
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("my-export")

The only module of the package that imports Transformers. No code comes from the folder of the model. Text is generated
without a cache of keys and values; `stackwise import` of the same folder generates with one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput, MaskedLMOutput, SequenceClassifierOutput

from stackwise.interop.own import MODEL_TYPE
from stackwise.model.positions import SinusoidalPositions
from stackwise.model.rack import Rack
from stackwise.model.spec import RackSpec

IGNORED = -100
"""Label of a position that is not scored."""


class StackWiseRackConfig(PretrainedConfig):
    """The config.json of a StackWise model: `rack` describes it."""

    model_type = MODEL_TYPE

    def __init__(
        self, rack: dict[str, Any] | None = None, stackwise: dict[str, Any] | None = None, **rest: Any
    ) -> None:
        self.rack = rack
        self.stackwise = stackwise
        rest.setdefault("use_cache", False)
        super().__init__(**rest)


class StackWisePreTrainedModel(PreTrainedModel):
    """A rack under the name `rack`."""

    config_class = StackWiseRackConfig
    base_model_prefix = "rack"
    _no_split_modules = ["Block"]

    def __init__(self, config: StackWiseRackConfig) -> None:
        super().__init__(config)
        if config.rack is None:
            raise ValueError("the configuration has no key rack, so it describes no StackWise model")
        self.rack = Rack(RackSpec.from_dict(config.rack))
        self._add_head()
        self.post_init()

    def _add_head(self) -> None:
        """What a class has besides the rack."""

    def get_input_embeddings(self) -> nn.Embedding:
        return self.rack.embedding

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """What a file does not hold: fixed tables, and the classifier of a model that had none."""
        if isinstance(module, SinusoidalPositions):
            length, width = module.table.shape
            module.table.copy_(SinusoidalPositions(length, width).table)
        elif isinstance(module, nn.Linear) and module is getattr(self, "score", None):
            module.weight.normal_(0.0, 0.02)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
        """Final hidden states [B, T, D]."""
        return self.rack.forward_features(input_ids, attention_mask, position_ids=position_ids)


class StackWiseForCausalLM(StackWisePreTrainedModel, GenerationMixin):
    """A causal rack with its head."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **unused: Any,
    ) -> CausalLMOutput:
        """Logits [B, T, V]; with `labels` also the loss of every token given those before it."""
        logits = self.rack.head(self.hidden(input_ids, attention_mask, position_ids))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED
            )
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **unused: Any
    ) -> dict[str, Any]:
        position_ids = None
        if attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}


class StackWiseForMaskedLM(StackWisePreTrainedModel):
    """A bidirectional rack with its head."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **unused: Any,
    ) -> MaskedLMOutput:
        """Logits [B, T, V]; with `labels` also the loss of the positions that have one."""
        logits = self.rack.head(self.hidden(input_ids, attention_mask, position_ids))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)
        return MaskedLMOutput(loss=loss, logits=logits)


class StackWiseForSequenceClassification(StackWisePreTrainedModel):
    """A rack and a linear classifier on the last token that is no padding (causal), or on the mean of all such."""

    def _add_head(self) -> None:
        self.score = nn.Linear(self.rack.spec.d_model, self.config.num_labels or 2, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **unused: Any,
    ) -> SequenceClassifierOutput:
        """Logits [B, num_labels]; with `labels` [B] also the loss, squared error where there is one label."""
        hidden = self.hidden(input_ids, attention_mask, position_ids)
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        if self.rack.is_causal:
            last = (real * torch.arange(real.shape[1], device=real.device)).argmax(dim=1)
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), last]
        else:
            pooled = (hidden * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True).clamp(min=1)
        logits = self.score(pooled)
        loss = None
        if labels is not None:
            one = self.config.num_labels == 1
            loss = F.mse_loss(logits.squeeze(-1), labels.float()) if one else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


AutoConfig.register(MODEL_TYPE, StackWiseRackConfig, exist_ok=True)
AutoModelForCausalLM.register(StackWiseRackConfig, StackWiseForCausalLM, exist_ok=True)
AutoModelForMaskedLM.register(StackWiseRackConfig, StackWiseForMaskedLM, exist_ok=True)
AutoModelForSequenceClassification.register(
    StackWiseRackConfig, StackWiseForSequenceClassification, exist_ok=True
)
