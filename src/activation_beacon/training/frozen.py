"""The mode in which a frozen base is read while beacons are trained: it answers the same whenever it is asked."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Within the block the base drops nothing, with gradient checkpointing or without; afterwards all is as it was.

    Transformers checkpoints a layer that is in training mode: that layer is put into it, not the modules in it, and its
    own rates of dropout are 0 meanwhile. Checkpointing has to be switched on before.
    """
    modes = [(module, module.training) for module in model.modules()]
    checkpointed = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    rates = [(module, name, rate) for module in checkpointed for name, rate in _rates(module).items()]
    model.eval()
    try:
        for module in checkpointed:
            module.training = True
        for module, name, _ in rates:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, rate in rates:
            setattr(module, name, rate)
        for module, mode in modes:
            module.training = mode


def _rates(module: nn.Module) -> dict[str, float]:
    """The rates of dropout that a module holds itself, as decoder layers of OPT or Doge do."""
    return {name: rate for name, rate in vars(module).items() if "drop" in name and isinstance(rate, float)}
