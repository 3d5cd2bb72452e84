"""Activation Beacon: long-context compression as a plug-in for any Hugging Face decoder."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from activation_beacon.base_models import load_pretrained_base
    from activation_beacon.cache import BeaconCache
    from activation_beacon.config import BeaconConfig
    from activation_beacon.conversation import Conversation
    from activation_beacon.exact import digit_ids
    from activation_beacon.hub import load
    from activation_beacon.model import BeaconModel, attach, detach
    from activation_beacon.model_forward import BeaconOutput
    from activation_beacon.official import export_official, import_official
    from activation_beacon.prompts import ChatPrompt

__version__ = "0.1.0"

__all__ = [
    "BeaconCache",
    "BeaconConfig",
    "BeaconModel",
    "BeaconOutput",
    "ChatPrompt",
    "Conversation",
    "SchemaLogitsProcessor",
    "attach",
    "detach",
    "digit_ids",
    "export_official",
    "import_official",
    "load",
    "load_pretrained_base",
]

# Imported when first used: the command line lives in this package, and its --help must not wait for torch.
_MODULE_OF = {
    "BeaconCache": "cache",
    "BeaconConfig": "config",
    "BeaconModel": "model",
    "BeaconOutput": "model_forward",
    "ChatPrompt": "prompts",
    "Conversation": "conversation",
    "SchemaLogitsProcessor": "grammar",
    "attach": "model",
    "detach": "model",
    "digit_ids": "exact",
    "export_official": "official",
    "import_official": "official",
    "load": "hub",
    "load_pretrained_base": "base_models",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
