"""FusionAI: pool ordinary GPUs over the internet to train models that none of them could hold alone.

The Python API is `train`, `load_weights` and `local_pool`, with the types of their arguments. `fusionai.errors` has the
errors that they raise. Each name is imported when it is first used, so that the command line starts without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusionai.execution.plane import OptimizerConfig
    from fusionai.owner.api import load_weights, train
    from fusionai.owner.local_pool import LocalPool as local_pool
    from fusionai.owner.membership import OwnerOptions
    from fusionai.owner.training_job import Observer, StepEvent, TrainingResult
    from fusionai.training.learning_rate import ScheduleConfig

__all__ = [
    "Observer",
    "OptimizerConfig",
    "OwnerOptions",
    "ScheduleConfig",
    "StepEvent",
    "TrainingResult",
    "load_weights",
    "local_pool",
    "train",
]

_PLACES = {
    "Observer": ("fusionai.owner.training_job", "Observer"),
    "OptimizerConfig": ("fusionai.execution.plane", "OptimizerConfig"),
    "OwnerOptions": ("fusionai.owner.membership", "OwnerOptions"),
    "ScheduleConfig": ("fusionai.training.learning_rate", "ScheduleConfig"),
    "StepEvent": ("fusionai.owner.training_job", "StepEvent"),
    "TrainingResult": ("fusionai.owner.training_job", "TrainingResult"),
    "load_weights": ("fusionai.owner.api", "load_weights"),
    "local_pool": ("fusionai.owner.local_pool", "LocalPool"),
    "train": ("fusionai.owner.api", "train"),
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'fusionai' has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _PLACES[name]
    return getattr(import_module(module), attribute)
