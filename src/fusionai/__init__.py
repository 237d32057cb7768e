"""FusionAI: pool ordinary GPUs over the internet to train and serve models none of them could hold alone.

The Python API is `train`, `load_weights` and `local_pool`; `fusionai.errors` holds what they raise. They are
imported when first used, so that the command line starts without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusionai.owner.api import load_weights, train
    from fusionai.owner.local_pool import LocalPool as local_pool

__all__ = ["load_weights", "local_pool", "train"]

_PLACES = {
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
