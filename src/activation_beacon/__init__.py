"""Activation Beacon: long-context compression as a plug-in for any Hugging Face decoder."""

from activation_beacon.base_models import load_pretrained_base
from activation_beacon.cache import BeaconCache
from activation_beacon.config import BeaconConfig
from activation_beacon.hub import load
from activation_beacon.model import BeaconModel, BeaconOutput, attach, detach
from activation_beacon.official import export_official, import_official
from activation_beacon.prompts import ChatPrompt

__version__ = "0.1.0"

__all__ = [
    "BeaconCache",
    "BeaconConfig",
    "BeaconModel",
    "BeaconOutput",
    "ChatPrompt",
    "attach",
    "detach",
    "export_official",
    "import_official",
    "load",
    "load_pretrained_base",
]
