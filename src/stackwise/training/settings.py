"""Settings of training: batches, budget, precision, learning rate and optimizer."""

import re
from typing import Annotated, Literal

from annotated_types import Ge, MaxLen, MinLen
from pydantic import AfterValidator, Field, JsonValue
from pydantic_core import PydanticCustomError

from stackwise.config.base import Settings
from stackwise.config.types import (
    Allowed,
    BelowOne,
    Flag,
    Int,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    UnitFloat,
    UpToOne,
)
from stackwise.curriculum.settings import ProgressiveSettings, StageSettings


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise PydanticCustomError(
            "regex", "not a regular expression ({reason})", {"reason": str(error)}
        ) from None
    return text


def _folder_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]+", text) or text in {".", ".."}:
        raise PydanticCustomError("folder_name", "not usable as the name of a run folder")
    return text


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]+)?", text):
        raise PydanticCustomError("device", "not a device")
    return text


def _class_path(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", text):
        raise PydanticCustomError("unknown_name", "not a known name")
    return text


OptimizerName = (
    Literal[
        "AdamW", "Adam", "SGD", "Muon", "Adadelta", "Adafactor", "Adagrad", "Adamax", "ASGD", "NAdam", "RAdam",
        "RMSprop", "Rprop",
    ]
    | Annotated[str, AfterValidator(_class_path), Allowed("module:Class")]
)  # fmt: skip


class ParameterGroup(Settings):
    """Rates for the parameters whose name matches."""

    match: Annotated[str, AfterValidator(_regex), Allowed("regular expression")]
    """Regular expression searched in the parameter's name, such as `embedding`; the first group that matches a parameter takes it."""
    lr: PositiveFloat | None = None
    """Learning rate of the group. null: the rate the parameters would have without it."""
    weight_decay: NonNegativeFloat | None = None
    """Weight decay of the group. null: the decay the parameters would have without it."""


class OptimizerSettings(Settings):
    """The optimizer and its parameter groups."""

    optimizer_type: OptimizerName = "AdamW"
    """Muon takes the matrices of the blocks, AdamW the rest. The names from Adadelta on are classes of torch.optim; `module:Class` is a `torch.optim.Optimizer` of your own. All but the first four take `lr`, `weight_decay` and `custom_params`."""
    lr: PositiveFloat = 1e-4
    """Peak learning rate."""
    adam_lr: PositiveFloat | None = None
    """Peak learning rate of the tensors Muon does not take. null: `lr`."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of matrices; norms, biases and embeddings have none."""
    betas: Annotated[list[BelowOne], MinLen(2), MaxLen(2)] = [0.9, 0.95]
    """Decay of the first and second moments of Adam."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator of Adam."""
    momentum: BelowOne = 0.9
    """Momentum of SGD and Muon; Muon is usually run at 0.95."""
    custom_params: dict[str, JsonValue] = {}
    """Extra keyword arguments of the optimizer, such as `{nesterov: true}`."""
    groups: list[ParameterGroup] = []
    """Parameters with rates of their own, by regular expression on their name."""
    memory: Literal["full", "int8", "int8_nomaster", "fused"] = "full"
    """Bytes per trained parameter. full: 16, all in float32. int8: 10, moments in 8 bits. int8_nomaster: 6, also weights and gradients in bfloat16, rounded stochastically. fused: 4, also each tensor steps during the backward pass and its gradient goes at once. Adapters, norms and tensors below 4096 numbers stay full. AdamW, Adam and Muon only."""
    state_device: Literal["device", "host"] = "device"
    """Where moments are kept between steps. device: with their parameter. host: in main memory, brought to the device one parameter at a time."""


class TrainingSettings(Settings):
    """The training loop."""

    unit: Literal["block", "stack", "rack"] = "stack"
    """The smallest piece that a stage trains: every block of a stack in a stage of its own, a stack, or the whole rack in one stage."""
    stages: Annotated[list[StageSettings], MinLen(1)] | None = None
    """A hand-written list of stages in place of the curriculum. null: `progressive` decides."""
    batch_size: PositiveInt = 4
    """Rows per micro-batch."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches per optimizer step; the loss does not depend on it."""
    seq_len: PositiveInt = 512
    """Tokens per row."""
    max_steps: PositiveInt | None = None
    """Optimizer steps per stack stage; wins over `epochs_per_stack`. null: by epochs."""
    epochs_per_stack: PositiveInt = 1
    """Passes over the training data per stack stage."""
    seed: Seed = 42
    """Seed of data order and initialisation."""
    deterministic: Flag = False
    """Use only kernels that give the same bits each time."""
    run_id: Annotated[str, AfterValidator(_folder_name), Allowed("letters, digits and . _ -")] = "default_run"
    """Name of the run folder in `checkpoint.dir`."""
    device: Annotated[str, AfterValidator(_device), Allowed("auto, cpu, cuda, cuda:N, mps")] = "auto"
    """Where to compute. auto: cuda, else mps, else cpu."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the computation; weights and optimizer state stay float32. auto: bfloat16 where the device computes it natively, else float32."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are scaled down to this norm; 0 is off."""
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """On a loss or gradient that is not finite. stop: end the run. skip: leave the step out, and stop after more than 10 of 1,000. rollback: leave it out, and after more than 10 of 1,000 go back to the last commit and skip the data since; stop where three times of that do not help."""
    spike_policy: Literal["off", "warn", "skip", "rollback"] = "off"
    """On a loss far above those before it. warn: note it. skip: leave the step out. rollback: go back to a commit `rollback_steps` earlier and skip the data since."""
    spike_sigma: PositiveFloat = 6.0
    """Standard deviations above the mean of the window from which a loss is a spike."""
    spike_window: Annotated[Int, Ge(4)] = 128
    """Losses of the stage, spikes excepted, that a new one is held against; judged once half of them are there."""
    rollback_steps: PositiveInt = 100
    """How far a spike goes back at least: to the newest commit so old, or the oldest of the stage."""
    recheck: Flag = False
    """Compute a step again when its loss or gradient is not finite or spikes. Another result means that the hardware is faulty, and the run stops."""
    lr_schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Course of the learning rate in each stage, after the warm-up; wsd holds it and decays at the end."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises from zero, at the start of the run."""
    decay_fraction: UpToOne = 0.2
    """Share of a stage's steps that decay, for wsd."""
    min_lr_ratio: UnitFloat = 0.1
    """Learning rate at the end of a stage, as a share of the peak."""
    new_stack_lr: PositiveFloat | None = None
    """Peak learning rate of a newly grown stack. null: `optimizer.lr`."""
    trunk_lr: PositiveFloat | None = None
    """Peak learning rate of older stacks where they train: a trainable trunk, and the joint phase. null: `optimizer.lr`."""
    gradient_checkpointing: Flag = False
    """Recompute the blocks' activations in the backward pass: less memory, about a third more time."""
    residency: Literal["resident", "streamed"] = "resident"
    """Where stacks that train live. streamed: weights, gradients and moments in host memory, updated there; a block at a time is copied to the device, and its activations are computed again in the backward pass."""
    compile: Flag = False
    """Compile each block with torch.compile: faster steps after a slow start."""
    loss_chunk_tokens: Literal["auto"] | PositiveInt = "auto"
    """Tokens per piece of the head and loss. auto: as many as keep the float32 logits under 256 MB."""
    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings)
    """The optimizer."""
    progressive: ProgressiveSettings = Field(default_factory=ProgressiveSettings)
    """Growth of the model, stack by stack."""
