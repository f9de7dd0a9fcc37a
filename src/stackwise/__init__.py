"""StackWise trains transformer language models stack by stack.

Every public name imports from here, `from stackwise import StackWiseConfig`, and is loaded when it
is first used, so that work on configurations never imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "stackwise.config.errors": ["ConfigError"],
    "stackwise.config.root": ["StackWiseConfig"],
    "stackwise.curriculum.builder": ["ProgressiveRackBuilder"],
    "stackwise.curriculum.curricula": ["stages"],
    "stackwise.curriculum.stage": ["Stage"],
    "stackwise.training.progressive_data": ["ProgressiveDataLoader"],
    "stackwise.model.attention.standalone": ["CoreAttention"],
    "stackwise.model.block": ["Block", "Stack"],
    "stackwise.model.factory": [
        "create_rack_from_config",
        "create_rack_from_specs",
        "create_simple_rack",
        "create_stack_from_config",
    ],
    "stackwise.model.heads": [
        "PairClassifier",
        "SequenceClassifier",
        "SequenceRegressor",
        "TokenClassifier",
        "ValueHead",
    ],
    "stackwise.model.lexical": ["LexicalKernelManager"],
    "stackwise.model.rack": ["Rack"],
    "stackwise.model.settings": ["ArchitectureConfig"],
    "stackwise.model.text_classifier": ["MLGKATextClassifier"],
    "stackwise.objectives.depth": ["MaskScheduler"],
    "stackwise.objectives.schedules": ["NoiseSchedule"],
    "stackwise.objectives.timesteps": ["ProgressiveMasking", "TimeStepMasking"],
    "stackwise.planning.plan": ["estimate_memory", "plan"],
    "stackwise.precision.manager": ["PrecisionManager"],
    "stackwise.storage.errors": ["CheckpointError"],
    "stackwise.training.run": ["train"],
    "stackwise.training.trainers": ["ArchitectureTrainer", "ProgressiveTrainer"],
    "stackwise.trunk.manager": ["MemoryManager"],
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "ArchitectureConfig",
    "ArchitectureTrainer",
    "Block",
    "CheckpointError",
    "ConfigError",
    "CoreAttention",
    "LexicalKernelManager",
    "MLGKATextClassifier",
    "MaskScheduler",
    "MemoryManager",
    "NoiseSchedule",
    "PairClassifier",
    "PrecisionManager",
    "ProgressiveDataLoader",
    "ProgressiveMasking",
    "ProgressiveRackBuilder",
    "ProgressiveTrainer",
    "Rack",
    "SequenceClassifier",
    "SequenceRegressor",
    "Stack",
    "StackWiseConfig",
    "Stage",
    "TimeStepMasking",
    "TokenClassifier",
    "ValueHead",
    "__version__",
    "create_rack_from_config",
    "create_rack_from_specs",
    "create_simple_rack",
    "create_stack_from_config",
    "estimate_memory",
    "plan",
    "stages",
    "train",
]

if TYPE_CHECKING:
    from stackwise.config.errors import ConfigError
    from stackwise.config.root import StackWiseConfig
    from stackwise.curriculum.builder import ProgressiveRackBuilder
    from stackwise.curriculum.curricula import stages
    from stackwise.curriculum.stage import Stage
    from stackwise.model.attention.standalone import CoreAttention
    from stackwise.model.block import Block, Stack
    from stackwise.model.factory import (
        create_rack_from_config,
        create_rack_from_specs,
        create_simple_rack,
        create_stack_from_config,
    )
    from stackwise.model.heads import (
        PairClassifier,
        SequenceClassifier,
        SequenceRegressor,
        TokenClassifier,
        ValueHead,
    )
    from stackwise.model.lexical import LexicalKernelManager
    from stackwise.model.rack import Rack
    from stackwise.model.settings import ArchitectureConfig
    from stackwise.model.text_classifier import MLGKATextClassifier
    from stackwise.objectives.depth import MaskScheduler
    from stackwise.objectives.schedules import NoiseSchedule
    from stackwise.objectives.timesteps import ProgressiveMasking, TimeStepMasking
    from stackwise.planning.plan import estimate_memory, plan
    from stackwise.precision.manager import PrecisionManager
    from stackwise.storage.errors import CheckpointError
    from stackwise.training.progressive_data import ProgressiveDataLoader
    from stackwise.training.run import train
    from stackwise.training.trainers import ArchitectureTrainer, ProgressiveTrainer
    from stackwise.trunk.manager import MemoryManager


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        if name.startswith("__"):
            raise AttributeError(f"module 'stackwise' has no attribute {name!r}")
        from stackwise.config.errors import did_you_mean

        hint = did_you_mean(name, __all__)
        raise AttributeError(f"stackwise has no {name!r}" + (f"; {hint}" if hint else ""))
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
