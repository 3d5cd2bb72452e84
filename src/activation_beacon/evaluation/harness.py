"""lm-eval's model "activation-beacon": any of its tasks on compressed contexts. Importing this module registers it."""

import contextlib
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from activation_beacon.base_models import max_positions
from activation_beacon.errors import InputError
from activation_beacon.hub import load
from activation_beacon.plan import TextPlanner
from activation_beacon.ratios import as_policy

NONE = "none"


@register_model("activation-beacon")
class BeaconLM(HFLM):
    """A model with beacons, for lm-eval.

    Prompts of more than a chunk and the local tokens are compressed on the way in; what stands after the last closed chunk,
    as a rule the question, stays raw.

    Args:
        pretrained: an adapter's folder or hub id, "default", or a model with beacons.
        beacon_ratio: a ratio, "auto", or "none" for the base model alone.
        tokenizer: of a model that is given as an object; otherwise the adapter's own.
        base: where the base model is, if it is elsewhere than the adapter says.
        max_length: tokens of a prompt at most; by default what fits: the base model's positions, times the ratio.
        dtype: float type to load in; None or "auto" for the base model's own.
        device: to load on; None for a CUDA device if there is one.
        batch_size: of the base model alone; with beacons it is 1.
        kwargs: further arguments of `HFLM`.

    Raises:
        InputError: for a model object without a tokenizer, or several texts at once with beacons.
        RatioError: if the adapter does not know the ratio.
    """

    def __init__(
        self,
        pretrained: Any = "default",
        *,
        beacon_ratio: int | str = "auto",
        tokenizer: Any = None,
        base: str | None = None,
        max_length: int | None = None,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str | None = 1,
        **kwargs: Any,
    ) -> None:
        self.is_base = str(beacon_ratio) == NONE
        if not self.is_base and str(batch_size or 1) != "1":
            raise InputError(
                f"batch_size ({batch_size}) must be 1 with beacons: lm-eval fills shorter texts up, and what it fills in would be "
                "compressed. Leave it out."
            )
        model = pretrained
        if isinstance(pretrained, str):
            found = "cuda" if torch.cuda.is_available() else "cpu"
            model, own = load(pretrained, base=base, dtype=None if dtype == "auto" else dtype, device=device or found)
            tokenizer = tokenizer or own
        if tokenizer is None:
            raise InputError("A model object needs its tokenizer beside it: BeaconLM(model, tokenizer=tokenizer).")
        ratio = _as_ratio(beacon_ratio)
        if not self.is_base:
            model.beacon_ratio = ratio
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            max_length=max_length or text_limit(model, None if self.is_base else ratio),
            device=device or str(model.device),
            batch_size=batch_size or 1,
            **kwargs,
        )

    def _model_call(self, *args: Any, **kwargs: Any) -> Any:
        with self._ways():
            return super()._model_call(*args, **kwargs)

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        with self._ways():
            return super()._model_generate(*args, **kwargs)

    def _ways(self) -> contextlib.AbstractContextManager[None]:
        return self.model.beacon_disabled() if self.is_base else contextlib.nullcontext()


def text_limit(model: Any, ratio: int | str | None) -> int | None:
    """Tokens of the longest text that fits at a ratio; at None, those that the base model reads. None where there is no limit."""
    if ratio is None:
        return max_positions(model)
    if model.max_positions is None:
        return None
    config = model.beacon_config
    largest = config.ratios[-1] if isinstance(ratio, str) else ratio
    return TextPlanner(config, as_policy(config, largest), model.max_positions).longest_text(largest)


def _as_ratio(given: int | str) -> Any:
    """The ratio as `BeaconModel` takes it; lm-eval hands down what stands on its command line."""
    text = str(given)
    return int(text) if text.isdecimal() else text
