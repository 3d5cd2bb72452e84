"""`generate` on compressed contexts and long prompts: what transformers' own loop needs to be told.

Of transformers' semi-private methods, `_prefill` reads the prompt, `prepare_inputs_for_generation` hands on the new ids alone, and two
others leave the cache and its length to us; everything else (sampling, beams, streamers, stopping, processors) is theirs. Ids
go in and come out as text: the cache is shorter.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin

from activation_beacon.attached import Attached
from activation_beacon.cache import BeaconCache
from activation_beacon.errors import InputError, UnsupportedError
from activation_beacon.forward import read
from activation_beacon.other_inputs import (
    KINDS_OF_TOKENS,
    OURS,
    other_input,
    refuse_other_inputs,
    without_kinds_of_text,
)
from activation_beacon.plan import TextPlanner
from activation_beacon.ratios import Ratio
from activation_beacon.readout import Wanted
from activation_beacon.row_ends import RowEnds, end_ids
from activation_beacon.unread import unread

REFUSED_OPTIONS = {
    "assistant_model": "assisted decoding takes back tokens that may be in closed chunks",
    "prompt_lookup_num_tokens": "prompt lookup takes back tokens that may be in closed chunks",
    "assistant_early_exit": "assisted decoding takes back tokens that may be in closed chunks",
    "cache_implementation": "the beacon cache takes its place; see context.quantize() and context.to()",
    "penalty_alpha": "contrastive search needs the hidden states of the whole prompt",
    "dola_layers": "DoLa needs the hidden states of the whole prompt",
    "speculation_type": "speculative decoding takes back tokens that may be in closed chunks",
    "use_mtp": "multi-token prediction takes back tokens that may be in closed chunks",
}
ARGUMENTS = tuple(inspect.signature(GenerationMixin.generate).parameters)  # self, inputs and generation_config first
LATER_ARGUMENTS = ARGUMENTS[3:]
DEFAULT_ANSWER = 20  # new tokens where nobody says how many

Option = Callable[[str], Any]


class BeaconGeneration(Attached):
    """The part of an attached model that `generate` uses; mixed in before the base's class."""

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        context: BeaconCache | None = None,
        beacon_ratio: Ratio | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate as transformers does, on a compressed context or with the prompt compressed on the way in.

        Args:
            inputs: (B, T) ids of the prompt, left-padded; with a context, ids of what follows it (the question).
            generation_config: as in transformers, like all further arguments.
            context: what was read before; stays as it was. One context serves a batch of prompts too.
            beacon_ratio: ratio of the chunks that are closed from now on; by default that of the context, or the model's
                `beacon_ratio` ("auto" unless set).

        Returns:
            What transformers returns; ids are those of `inputs` and of the answer. With `return_dict_in_generate`,
            `past_key_values` is the grown context.

        Raises:
            UnsupportedError: for options that cannot work on compressed contexts, by name.
            MismatchError: if the context comes from another base model or adapter.
            CapacityError: if the prompt cannot fit the base model's positions.
        """
        kwargs |= dict(zip(LATER_ARGUMENTS, args, strict=False))
        if generation_config is not None:  # not in its place: some models' own `generate` has another argument there
            kwargs["generation_config"] = generation_config
        if self._beacon.state.is_disabled:
            _refuse_while_disabled(context, beacon_ratio)
            return super().generate(inputs, **kwargs)
        option = self.generation_option(generation_config, kwargs)
        _refuse_options(option, generation_config, kwargs)
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        given = kwargs.get("past_key_values")
        if context is not None:
            _check_context(context, given, input_ids)
        embeds = kwargs.get("inputs_embeds")
        is_others = given is not None and not isinstance(given, BeaconCache)
        if input_ids is None or embeds is not None or is_others:
            held = given if embeds is not None and not is_others else None
            self._refuse_beacons_by_name(held if context is None else context, beacon_ratio)
            self._refuse_long_prompt_on(given, input_ids if embeds is None else embeds)
        elif self._is_left_whole(input_ids, context is None and given is None and beacon_ratio is None, kwargs):
            with self.beacon_disabled():
                return super().generate(inputs, **kwargs)
        elif option("use_cache") is False:
            if context is not None or given is not None or beacon_ratio is not None:
                raise UnsupportedError("use_cache=False leaves no cache to hold beacons. Generate with use_cache=True.")
        elif self._is_compressible(input_ids, context is None and given is None, option, kwargs):
            cache = self._generation_cache(input_ids, context, given, beacon_ratio)
            self._check_capacity(cache, input_ids, option, kwargs["attention_mask"], is_named=beacon_ratio is not None)
            return self._generate_on(cache, given, inputs, kwargs, option)
        return super().generate(inputs, **kwargs)

    def _generate_on(
        self,
        planned: BeaconCache,
        given: BeaconCache | None,
        inputs: torch.Tensor | None,
        kwargs: dict[str, Any],
        option: Option,
    ) -> Any:
        """Generate on a fork, or on the caller's own cache where it has the fork's policy and rows and so grows in place.

        Else it becomes what the fork is in the end: a call that fails leaves it as it was. Rows that have ended before others
        give back the padding that they have read since.
        """
        if given is not None and (given.policies, given.rows) == (planned.policies, planned.rows):
            given.is_continued = True
            planned = given
        ends = RowEnds(kwargs.get("stopping_criteria") or ())
        ours = {"past_key_values": planned, "stopping_criteria": ends}
        output = super().generate(inputs, **{**kwargs, **ours})
        is_kept = given is not None or getattr(output, "past_key_values", None) is planned
        if is_kept and (option("num_beams") or 1) == 1:  # beams change places
            self._take_back(planned, ends.padding(planned))
        if given is not None and planned is not given:
            given.adopt(planned)
            given.is_continued = True
            if getattr(output, "past_key_values", None) is planned:
                output.past_key_values = given
        return output

    def _take_back(self, cache: BeaconCache, counts: Sequence[int]) -> None:
        """Take back so many tokens of each row's tail; where layers carry a state, what is left of the tail is read again."""
        if not any(counts):
            return
        if not cache.is_recurrent:
            cache.take_back(counts)
            return
        rows = [cache.row(index) for index in range(cache.batch_size)]
        for index, count in enumerate(counts):
            left = rows[index].tail_length - count
            if count:
                tail = rows[index].token_ids[:, rows[index].tokens_seen - rows[index].tail_length :]
                rows[index] = rows[index].without_tail()
                if left:
                    with torch.no_grad():
                        new = self._new_tokens(tail[:, :left], None)
                        read(self, self._beacon.site, rows[index], new, Wanted())
        cache.adopt(BeaconCache.stack(rows))

    def generation_option(self, generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> Option:
        """Finds an option of a call of `generate` as transformers does: its arguments, its config, the model's config."""
        configs = (generation_config, self.generation_config)

        def option(name: str) -> Any:
            values = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
            return next((value for value in values if value is not None), None)

        return option

    def _is_left_whole(self, input_ids: torch.Tensor, is_free: bool, kwargs: dict[str, Any]) -> bool:
        """Whether a prompt is left to the base together with its answer, since there is more in it than ids.

        Args:
            input_ids: of the prompt.
            is_free: whether the call names no context, cache or ratio.
            kwargs: of the call.

        Raises:
            UnsupportedError: if there is, but the prompt is to be compressed.
        """
        names = {"input_ids", *ARGUMENTS, *vars(self.generation_config)}
        known = [inspect.signature(each).parameters for each in (self.forward, self.prepare_inputs_for_generation)]
        others = {
            name: value for name, value in kwargs.items() if name not in names and any(name in own for own in known)
        }
        others = without_kinds_of_text(others)  # transformers tells of names that nobody knows
        if other_input(others) is None:
            return False
        if not is_free or input_ids.dim() != 2 or input_ids.shape[1] > self.untouched_length:
            refuse_other_inputs(others)
        return True

    def _is_compressible(self, input_ids: torch.Tensor, is_fresh: bool, option: Option, kwargs: dict[str, Any]) -> bool:
        """Check the prompt, and see to its mask; False where it is left to transformers as it is."""
        if input_ids.dim() != 2:
            raise InputError(f"input_ids must be (B, T); got {tuple(input_ids.shape)}. Give one row for each prompt.")
        if input_ids.shape[1] == 1:  # longer ones are checked where they are read
            self._check_vocabulary(input_ids)
        is_untouched = is_fresh and input_ids.shape[1] <= self.untouched_length
        if kwargs.get("attention_mask") is None:
            mask, has_holes = _inferred_mask(input_ids, _pad_token(option))
            if has_holes and is_untouched:  # transformers leaves holes out
                return False
            kwargs["attention_mask"] = mask
        mask = kwargs["attention_mask"]
        if not is_untouched and not bool((mask[:, -1:] > 0).all()):
            raise InputError("A row of attention_mask ends in padding. Pad prompts on the left: padding_side='left'.")
        return True

    def _refuse_long_prompt_on(self, given: Any, prompt: torch.Tensor | None) -> None:
        """Refuse to leave a prompt, ids (B, T) or embeddings (B, T, M), to the base that is too long to stay uncompressed."""
        if prompt is None or prompt.shape[1] <= self.untouched_length:
            return
        if prompt.dim() == 3:
            raise UnsupportedError(
                f"Closing chunks needs input_ids; got inputs_embeds of {prompt.shape[1]} tokens, more than a chunk. "
                "Give ids, or use beacon_disabled()."
            )
        if given is not None:
            raise UnsupportedError(
                f"A {type(given).__name__} cannot hold beacons, and the prompt of {prompt.shape[1]} tokens is longer than "
                f"a chunk. Leave past_key_values out, or use beacon_disabled()."
            )

    def _refuse_beacons_by_name(self, context: BeaconCache | None, beacon_ratio: Ratio | None) -> None:
        if context is not None or beacon_ratio is not None:
            raise UnsupportedError("Compressing needs input_ids and a cache of its own; got neither or another cache.")

    def _generation_cache(
        self, input_ids: torch.Tensor, context: BeaconCache | None, given: BeaconCache | None, ratio: Ratio | None
    ) -> BeaconCache:
        held = given if context is None else context
        if held is None:
            return self.new_cache(input_ids.shape[0], ratio=ratio)
        self.check_can_read_on(held)
        cache = held.fork()
        cache.is_continued = given is not None
        if context is not None:
            cache.context_lengths = tuple(row.tokens_seen for row in cache.rows)
        if ratio is not None:
            cache.policies = self.revised_policies(cache, ratio)
        if cache.batch_size == 1 and input_ids.shape[0] > 1:
            cache.batch_repeat_interleave(input_ids.shape[0])
        if cache.batch_size != input_ids.shape[0]:
            raise InputError(
                f"The context has {cache.batch_size} rows, the prompt {input_ids.shape[0]}. Stack as many contexts, or give one."
            )
        return cache

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> Any:
        """Theirs, without the warning that the text is longer than the base's positions: the cache is not."""
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        ends = kwargs.get("stopping_criteria")
        if isinstance(ends, RowEnds):
            ends[:] = criteria
            criteria = ends
        for criterion in criteria if not self._beacon.state.is_disabled else ():
            if hasattr(criterion, "max_position_embeddings"):
                criterion.max_position_embeddings = None
        return criteria

    def _check_capacity(
        self,
        cache: BeaconCache,
        input_ids: torch.Tensor,
        option: Option,
        attention_mask: torch.Tensor,
        *,
        is_named: bool,
    ) -> None:
        """Refuse now, rather than after half an answer, what would not fit the base model's positions.

        Where the call names ratios, a sequence of them is to name every chunk of the prompt; chunks of the answer have the last.
        """
        num_answer = option("max_new_tokens")
        if num_answer is None:
            longest = option("max_length")
            num_answer = DEFAULT_ANSWER if longest is None else longest - input_ids.shape[1]
        new_ids, mask = unread(input_ids, attention_mask, cache) if cache.is_continued else (input_ids, attention_mask)
        assert mask is not None
        counts = mask[:, -new_ids.shape[1] :].sum(dim=1).tolist()
        for row, policy, count in zip(cache.rows, cache.policies, counts, strict=True):
            planner = TextPlanner(cache.config, policy, self.max_positions)
            if is_named:
                planner.check_names_every_chunk(row.tokens_seen + int(count))
            planner.check_grows(row, int(count), max(1, num_answer) - 1)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> Any:
        """Theirs, without the kind of cache that some models ask for by default: the beacon cache takes its place."""
        if isinstance(model_kwargs.get("past_key_values"), BeaconCache):
            generation_config.cache_implementation = None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)

    def _prefill(
        self,
        input_ids: torch.Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        """Read the prompt into the cache, once for all beams and sequences that will go on from it."""
        cache = model_kwargs.get("past_key_values")
        if not isinstance(cache, BeaconCache):
            return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)
        copies = input_ids.shape[0] // cache.batch_size
        mask = model_kwargs.get("attention_mask")
        is_short = cache.num_slots == 0 and input_ids.shape[1] <= cache.config.untouched_length
        if copies > 1 and is_short:  # as the base does, bit for bit
            cache.batch_repeat_interleave(copies)
            copies = 1
        new_ids, new_mask = input_ids[::copies], None if mask is None else mask[::copies]
        if cache.is_continued:
            new_ids, new_mask = unread(new_ids, new_mask, cache)
        others = {name: value for name, value in model_kwargs.items() if name not in OURS and value is not None}
        outputs = self(
            input_ids=new_ids,
            attention_mask=new_mask,
            position_ids=model_kwargs.get("position_ids") if is_short else None,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
            **others,
        )
        if copies > 1:
            cache.batch_repeat_interleave(copies)
            for name in ("logits", "hidden_states", "attentions"):
                if outputs.get(name) is not None:
                    outputs[name] = _repeated(outputs[name], copies)
        return outputs

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of a decode step: the new ids only; positions and masks follow from the cache."""
        if not isinstance(past_key_values, BeaconCache):
            return super().prepare_inputs_for_generation(
                input_ids,
                next_sequence_length=next_sequence_length,
                past_key_values=past_key_values,
                attention_mask=attention_mask,
                **kwargs,
            )
        for name in ("position_ids", *KINDS_OF_TOKENS):
            kwargs.pop(name, None)
        if next_sequence_length is not None:  # of all ids, Phi-3 concludes that the text has outgrown the cache
            input_ids = input_ids[:, -next_sequence_length:]
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, past_key_values=past_key_values, **kwargs
        )

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: continuous batching keeps keys and values in pages of its own.

        Raises:
            UnsupportedError: unless beacons are disabled.
        """
        if not self._beacon.state.is_disabled:
            raise UnsupportedError(
                "generate_batch cannot take compressed contexts. Use generate with stacked contexts."
            )
        return super().generate_batch(*args, **kwargs)


def _check_context(context: Any, given: Any, input_ids: torch.Tensor | None) -> None:
    """Refuse a context that is none, or comes with another cache, or without ids that follow it."""
    if given is not None:
        raise InputError("generate takes context or past_key_values, not both. Use context; it stays as it was.")
    if not isinstance(context, BeaconCache):
        raise InputError(
            f"context must be a BeaconCache; got {type(context).__name__}. Load it: BeaconCache.load(path, model)."
        )
    if input_ids is None:
        raise InputError("generate(context=...) needs input_ids: the ids of what follows the context, a question.")


def _repeated(value: Any, copies: int) -> Any:
    """A tensor, or a tuple of them, with each row so many times."""
    if isinstance(value, torch.Tensor):
        return value.repeat_interleave(copies, dim=0)
    return tuple(each if each is None else _repeated(each, copies) for each in value)


def _inferred_mask(input_ids: torch.Tensor, pad_token: int | None) -> tuple[torch.Tensor, bool]:
    """The mask (B, T) of a prompt that came without one: leading padding is left out, the rest is text.

    Returns:
        The mask, and whether the padding token stands inside the text too, where transformers would leave it out.
    """
    is_text = torch.ones_like(input_ids) if pad_token is None else (input_ids != pad_token).long()
    mask = is_text.cummax(dim=1).values
    empty = mask.sum(dim=1, keepdim=True) == 0  # a row of padding only is a text of that token
    mask = torch.where(empty, torch.ones_like(mask), mask)
    return mask, not torch.equal(mask, is_text)


def _pad_token(option: Option) -> int | None:
    """The token that pads prompts; None where it is an end of text as well, and so may be part of one."""
    pad, eos = option("pad_token_id"), option("eos_token_id")
    return None if pad in end_ids(eos) else pad


def _refuse_while_disabled(context: BeaconCache | None, beacon_ratio: Ratio | None) -> None:
    if context is not None or beacon_ratio is not None:
        what = "beacon_ratio" if context is None else "A context"
        raise UnsupportedError(f"{what} cannot be used while beacons are disabled. Leave beacon_disabled() first.")


def _refuse_options(option: Option, generation_config: GenerationConfig | None, kwargs: dict[str, Any]) -> None:
    for name, reason in REFUSED_OPTIONS.items():
        value = option(name)
        if name == "cache_implementation":  # a model's own default gives way
            value = kwargs.get(name) or getattr(generation_config, name, None)
        if value is not None and value is not False:
            raise UnsupportedError(
                f"generate({name}=...) does not work with beacons: {reason}. Leave it out, or disable them."
            )
