"""The forward of an attached model: texts that close no chunk are left to the base, longer ones are read chunk by chunk."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from activation_beacon.at_once import read_at_once
from activation_beacon.batch import NewTokens, has_one_run_each, mean_loss, targets, token_losses
from activation_beacon.cache import BeaconCache
from activation_beacon.constants import sent
from activation_beacon.errors import InputError, UnsupportedError
from activation_beacon.forward import read
from activation_beacon.generation import BeaconGeneration
from activation_beacon.other_inputs import other_input, positions_of, refuse_other_inputs, without_kinds_of_text
from activation_beacon.plan import Row, TextPlanner
from activation_beacon.ratios import Ratio, as_policy
from activation_beacon.readout import OF_ONE_PASS, Wanted

# B batch · N new tokens · T tokens of a text · V vocabulary · M model dim


@dataclass
class BeaconOutput(CausalLMOutputWithPast):
    """What transformers returns, and the loss of each token.

    Attributes:
        nll: (B, N - 1) in nats, NaN where the label is -100 or padding; None without labels, and of short texts that are left to
            the base because of their masks, positions or other inputs.
    """

    nll: torch.Tensor | None = None


class BeaconForward(BeaconGeneration):
    """The part of an attached model that is called as the base is; mixed in before the base's class."""

    def base_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's own forward."""
        own = self._beacon.own_forward
        return own(*args, **kwargs) if own is not None else super().forward(*args, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        *,
        beacon_ratio: Ratio | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward; texts longer than `untouched_length` are read chunk by chunk on compressed contexts.

        Arguments are transformers'. Also:
            past_key_values: a `BeaconCache` is read on in place. Any other cache is left to the base model.
            labels: (B, N) targets; the loss is the mean next-token cross-entropy over raw tokens (section 3.2), and
                gradients flow through all chunks.
            logits_to_keep: an int; 0 for the logits of all tokens. Long texts with labels need little memory with 1.
            beacon_ratio: as `ratio` in `compress`.

        Returns:
            `BeaconOutput` with `loss`, `logits`, `past_key_values` and `nll`. Hidden states and attentions, where asked
            for, are those of the tail's pass.

        Raises:
            UnsupportedError: for `inputs_embeds`, 4D masks or packed sequences longer than `untouched_length`, by name.
        """
        _refuse_other_names(kwargs)
        given: dict[str, Any] = {"attention_mask": attention_mask, "position_ids": position_ids}
        given["inputs_embeds"] = inputs_embeds
        given |= {"labels": labels, "use_cache": use_cache, "logits_to_keep": logits_to_keep}
        cache = past_key_values if isinstance(past_key_values, BeaconCache) else None
        if self._beacon.state.is_disabled:
            if cache is not None:
                self._refuse_disabled()
            return self.base_forward(input_ids, past_key_values=past_key_values, **given, **kwargs)
        if past_key_values is not None and cache is None:
            self._refuse_beacons_by_name(None, beacon_ratio)
            return self.base_forward(input_ids, past_key_values=past_key_values, **given, **kwargs)
        if input_ids is None or (attention_mask is not None and attention_mask.dim() != 2):
            self._refuse_long_or_compressed(inputs_embeds if input_ids is None else input_ids, cache, beacon_ratio)
            return _with_nll(self.base_forward(input_ids, **given, **kwargs), labels)
        others = without_kinds_of_text(kwargs)
        is_free = cache is None and beacon_ratio is None
        if is_free and self._is_for_the_base(input_ids, attention_mask, position_ids, others):
            return _with_nll(self.base_forward(input_ids, **given, **kwargs), labels)
        refuse_other_inputs(others)
        keep_cache = cache is not None or self._keeps_cache(use_cache)
        cache = self._opened(cache, input_ids)
        new = self._new_tokens(input_ids, attention_mask)
        wants_more = isinstance(logits_to_keep, torch.Tensor) or any(map(kwargs.get, OF_ONE_PASS))
        is_short = self._is_left_to_the_base(cache, new, is_read_in_turn=keep_cache and not wants_more)
        if labels is not None and (keep_cache or not is_short):
            self._check_labels(labels)
        if keep_cache or not is_short:
            self._refuse_checkpointing()
        with cache.under(self.revised_policies(cache, beacon_ratio)):
            if beacon_ratio is not None:
                self._check_names_every_chunk(cache, new)
            if is_short:
                output = self._forward_short(input_ids, cache if keep_cache else None, new, given, kwargs)
            else:
                output = self._forward_long(cache, new, given, others, keep_cache=keep_cache)
        return output if kwargs.get("return_dict", True) is not False else output.to_tuple()

    def hidden_states(
        self, input_ids: torch.Tensor, ratios: Sequence[int], *, chunk_size: int | None = None
    ) -> torch.Tensor:
        """Hidden states (B, T, M) of raw tokens before the head, all chunks in one pass, as reading chunk by chunk gives.

        For training: no cache is made, gradients flow through all chunks, and gradient checkpointing works. Call it in a
        block of `at_once.chunks_at_once`, backward pass included. Every full chunk but the last has beacons, whatever
        the model's local tokens: beacons do not depend on them, and learn from all that follows.

        Args:
            input_ids: (B, T) texts of one length; shorter ones are padded on the right, within the tail.
            ratios: one for each chunk that is closed, for all rows.
            chunk_size: another than the adapter's: what is learnt on short chunks serves long ones.

        Raises:
            ConfigError: if `chunk_size` is not divisible by every ratio.
            RatioError: if there are fewer ratios than chunks.
            CapacityError: if the base model has fewer positions than that takes.
            InputError: for an empty text, or ids outside the vocabulary.
        """
        self._refuse_disabled()
        new = self._new_tokens(input_ids, None)
        config = dataclasses.replace(self._beacon.config, local_tokens=0)
        if chunk_size is not None:
            config = dataclasses.replace(config, chunk_size=chunk_size)
        planner = TextPlanner(config, as_policy(config, tuple(ratios)), self.max_positions)
        planner.check_names_every_chunk(new.columns)
        reading = planner.plan(Row(config.chunk_size), new.columns)
        return read_at_once(self, self._beacon.site, config, new.ids, reading.closings)

    def _is_for_the_base(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        others: dict[str, Any],
    ) -> bool:
        """Whether a text that no chunk is closed of comes with what only the base can make sense of: a mask, positions, pictures.

        Its cache is then the base's own, which stays uncompressed.
        """
        if input_ids.dim() != 2 or input_ids.shape[1] > self.untouched_length:
            return False
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            return False
        if other_input(others) is not None or (attention_mask is not None and not has_one_run_each(attention_mask)):
            return True
        return position_ids is not None and not _count_up(position_ids, self._new_tokens(input_ids, attention_mask))

    def _is_left_to_the_base(self, cache: BeaconCache, new: NewTokens, *, is_read_in_turn: bool) -> bool:
        """Whether a text closes no chunk; and, if it can be read row by row, has no padding before it that would change states."""
        has_traces = is_read_in_turn and self._beacon.site.padding_leaves_traces and new.begins_in_padding
        return cache.num_slots == 0 and max(new.counts) <= cache.config.untouched_length and not has_traces

    def _reads_padding_into_states(self, new: NewTokens) -> bool:
        site = self._beacon.site
        return site.is_recurrent and (new.ends_in_padding or (site.padding_leaves_traces and new.begins_in_padding))

    def _keeps_cache(self, use_cache: bool | None) -> bool:
        if use_cache is None:
            use_cache = getattr(self.config.get_text_config(decoder=True), "use_cache", True)
        return bool(use_cache) and not self.training

    def _refuse_long_or_compressed(
        self, inputs: torch.Tensor | None, cache: BeaconCache | None, ratio: Ratio | None
    ) -> None:
        if cache is not None or ratio is not None or (inputs is not None and inputs.shape[1] > self.untouched_length):
            raise UnsupportedError(
                "Closing chunks needs input_ids and masks of two dimensions; got inputs_embeds or a mask of another shape. "
                "Give ids, or use beacon_disabled()."
            )

    def _forward_short(
        self,
        input_ids: torch.Tensor,
        cache: BeaconCache | None,
        new: NewTokens,
        given: dict[str, Any],
        kwargs: dict[str, Any],
    ) -> BeaconOutput:
        """No chunk is closed: the base's own forward with the caller's own arguments."""
        if cache is not None and self._reads_padding_into_states(new):
            return self._forward_short_beside(input_ids, cache, new, given, kwargs)
        if cache is not None:
            _refuse_packed(given["position_ids"], new)
        labels = given["labels"]
        is_padded = any(count < new.columns for count in new.counts)
        inputs = dict(given, labels=None if is_padded else labels)
        if (
            cache is not None and any(new.starts) and given["position_ids"] is None
        ):  # some bases would not count padding
            inputs["position_ids"] = torch.arange(new.columns, device=input_ids.device).expand(input_ids.shape)
        if labels is not None:
            inputs["logits_to_keep"] = 0
        if self.training:
            inputs["use_cache"] = False
        kwargs = {**kwargs, "return_dict": True}
        num_items = kwargs.pop("num_items_in_batch", None) if labels is None or is_padded else None
        try:
            output = self.base_forward(input_ids, past_key_values=cache, **inputs, **kwargs)
            nll, loss = None, output.loss
            if labels is not None:
                nll = token_losses(output.logits, targets(labels, new))
                loss = mean_loss(nll, num_items) if is_padded else loss
                output.logits = _kept(output.logits, given["logits_to_keep"])
            if cache is not None:
                self._move_to_origin(cache, new, given["position_ids"])
                _note_read(cache, new)
        except BaseException:
            if cache is not None:
                cache.layers = [layer.emptied() for layer in cache.layers]
            raise
        return _as_ours(output, loss, nll)

    def _forward_short_beside(
        self,
        input_ids: torch.Tensor,
        cache: BeaconCache,
        new: NewTokens,
        given: dict[str, Any],
        kwargs: dict[str, Any],
    ) -> BeaconOutput:
        """The same, where the base would read padding into states: what is kept of the text is read by itself."""
        _refuse_packed(given["position_ids"], new)
        output = self._forward_short(input_ids, None, new, {**given, "use_cache": False}, kwargs)
        read(self, self._beacon.site, cache, new, Wanted())
        output.past_key_values = cache
        return output

    def _move_to_origin(self, cache: BeaconCache, new: NewTokens, position_ids: torch.Tensor | None) -> None:
        """Move what the base has read behind padding to the positions that it holds: each row begins at 0."""
        first = new.starts
        if position_ids is not None:
            first = [int(positions_of(position_ids, row, start, 1)[0, 0]) for row, start in enumerate(new.starts)]
        if not any(first):
            return
        for layer, rope in zip(cache.layers, self._beacon.site.ropes, strict=True):
            if rope is not None and layer.keys is not None and layer.values is not None:
                cos, sin = rope.rotation(sent(first, layer.keys.device).neg())
                rotation = (cos.transpose(0, 1), sin.transpose(0, 1))
                layer.keys, layer.values = rope.move_entries(layer.keys, layer.values, rotation)

    def _forward_long(
        self, cache: BeaconCache, new: NewTokens, given: dict[str, Any], kwargs: dict[str, Any], *, keep_cache: bool
    ) -> BeaconOutput:
        keep, labels = given["logits_to_keep"], given["labels"]
        if isinstance(keep, torch.Tensor):
            raise UnsupportedError("logits_to_keep must be an int for texts that are compressed; got a tensor.")
        _refuse_packed(given["position_ids"], new)
        options = {name: value for name, value in kwargs.items() if name not in ("return_dict", "num_items_in_batch")}
        wanted = Wanted(
            first_column=max(0, new.columns - keep) if keep else 0,
            labels=None if labels is None else targets(labels, new),
            options=options,
        )
        readout = read(self, self._beacon.site, cache, new, wanted)
        loss = None if readout.nll is None else mean_loss(readout.nll, kwargs.get("num_items_in_batch"))
        fields = {name: getattr(readout.last, name, None) for name in ("hidden_states", "attentions")}
        past = cache if keep_cache else None
        return BeaconOutput(loss=loss, logits=readout.logits, past_key_values=past, nll=readout.nll, **fields)


def _note_read(cache: BeaconCache, new: NewTokens) -> None:
    """Enter into an empty cache what the base has just read into it, rows aligned at the right: all of it or nothing."""
    rows = tuple(row.after_reading(count) for row, count in zip(cache.rows, new.counts, strict=True))
    token_ids = new.right_aligned()
    if len(set(new.counts)) > 1 or new.counts[0] < new.columns:
        cache.align(rows, [start + count for start, count in zip(new.starts, new.counts, strict=True)])
    cache.token_ids, cache.rows = token_ids, rows


def _kept(logits: torch.Tensor, keep: int | torch.Tensor) -> torch.Tensor:
    return logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]


def _as_ours(output: ModelOutput, loss: torch.Tensor | None, nll: torch.Tensor | None) -> BeaconOutput:
    """What the base returns, as what an attached model returns."""
    fields = {name: output.get(name) for name in ("hidden_states", "attentions", "past_key_values")}
    ours = BeaconOutput(loss=loss, logits=output.logits, nll=nll, **fields)
    for name in output.keys() - ours.keys():  # such as the router's logits of a mixture of experts
        ours[name] = output[name]
    return ours


def _with_nll(output: Any, labels: torch.Tensor | None) -> Any:
    """What the base returns of a text that it reads by itself: with labels, losses of single tokens are asked for in vain."""
    return output if labels is None or not isinstance(output, ModelOutput) else _as_ours(output, output.loss, None)


def _count_up(position_ids: torch.Tensor, new: NewTokens) -> bool:
    """Whether the positions of each row's tokens count up one by one, along all axes if there are several."""
    for row, (start, count) in enumerate(zip(new.starts, new.counts, strict=True)):
        positions = positions_of(position_ids, row, start, count)
        if positions.numel() == 1:  # a step of decoding: nothing to wait for
            continue
        if not bool((positions == positions[:1, :1] + torch.arange(count, device=positions.device)).all()):
            return False
    return True


def _refuse_packed(position_ids: torch.Tensor | None, new: NewTokens) -> None:
    if position_ids is not None and not _count_up(position_ids, new):
        raise UnsupportedError(
            "position_ids that do not count up (packed sequences, pictures) cannot be compressed. Leave them out."
        )


def _refuse_other_names(kwargs: dict[str, Any]) -> None:
    for name, right in (("context", "past_key_values"), ("ratio", "beacon_ratio")):
        if name in kwargs:
            raise InputError(f"A model's forward calls it {right}, not {name}. Use model(..., {right}=...).")
