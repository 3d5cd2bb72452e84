"""Every error that this package raises on purpose.

Each one is a `BeaconError` and also the standard library's kind of error, so that callers may catch either. A message is
one line: the rule, the values that broke it, and the way out.
"""


class BeaconError(Exception):
    """Base class of all errors that are raised for a reason a user can act on."""


class ConfigError(BeaconError, ValueError):
    """A `BeaconConfig` that cannot work, alone or with this base model."""


class RatioError(BeaconError, ValueError):
    """A compression ratio, budget or span that the chunk size, the adapter or the text does not allow."""


class CapacityError(BeaconError, ValueError):
    """A cache that would need more positions than the base model has."""


class InputError(BeaconError, ValueError):
    """Token ids, masks or texts that cannot be read."""


class UnsupportedError(BeaconError, NotImplementedError):
    """A call that beacons cannot serve, refused by name rather than answered wrongly."""


class UnsupportedModelError(UnsupportedError):
    """A base model whose architecture cannot carry beacons, with the reason."""


class AttachError(BeaconError, RuntimeError):
    """Attaching to a model that carries beacons already, or using one that carries none."""


class MismatchError(BeaconError, ValueError):
    """A context or an adapter that was made with another base model, adapter or configuration."""


class FileFormatError(BeaconError, ValueError):
    """A file that is damaged, cut short, or not one of ours."""


class StorageError(BeaconError, OSError):
    """A file that cannot be read or written."""


class BaseModelError(BeaconError, OSError):
    """A base model that cannot be found, fetched or built."""


class TrainingError(BeaconError, RuntimeError):
    """A training run that must not go on: a loss that is no number, or one that runs away."""


class PeerError(BeaconError, RuntimeError):
    """Another project's method that cannot be run, or that does not answer as it must."""


def reason(error: BaseException) -> str:
    """One line of what an error says, without a full stop; its kind where it says nothing."""
    lines = (getattr(error, "strerror", None) or str(error)).strip().splitlines()
    return lines[0].rstrip(" .:") if lines else type(error).__name__
