"""The face: attach beacons to a decoder, compress, ask, detach."""

import contextlib
import dataclasses
import functools
import inspect
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from activation_beacon.adapt import find_decoder
from activation_beacon.at_once import read_at_once
from activation_beacon.attachment import (
    Attachment,
    base_weights,
    check_chunk_fits,
    check_in_memory,
    first_embedding,
    new_token,
    put_on,
    take_off,
    with_base,
)
from activation_beacon.batch import (
    IGNORED,
    NewTokens,
    as_batch,
    as_ids,
    as_tensor,
    has_one_run_each,
    mean_loss,
    runs,
    targets,
    token_losses,
)
from activation_beacon.cache import BeaconCache
from activation_beacon.config import BeaconConfig, is_same_fingerprint, short_fingerprint
from activation_beacon.constants import sent
from activation_beacon.dense import is_quantised
from activation_beacon.entries import take
from activation_beacon.errors import AttachError, ConfigError, InputError, MismatchError, UnsupportedError
from activation_beacon.fingerprint import fingerprint
from activation_beacon.forward import Progress, read
from activation_beacon.generation import BeaconGeneration, refuse_other_inputs
from activation_beacon.matmul import CHOICES, is_chosen, is_offered
from activation_beacon.persistence import save_adapter
from activation_beacon.plan import Ratio, RatioPolicy, Row, TextPlanner, as_policy, revised
from activation_beacon.projection import BeaconProjection, PassState, products_of
from activation_beacon.ragged import read_next
from activation_beacon.readout import Wanted

# B batch · N new tokens · V vocabulary · M model dim

logger = logging.getLogger(__name__)


@dataclass
class BeaconOutput(CausalLMOutputWithPast):
    """What transformers returns, and the loss of each token.

    Attributes:
        nll: (B, N - 1) in nats, NaN where the label is -100 or padding; None without labels, and of short texts with masks or
            positions that are left to the base.
    """

    nll: torch.Tensor | None = None


class BeaconModel(BeaconGeneration):
    """What `attach` adds to a model; mixed in before its own class. The same object, still its own class to isinstance."""

    _beacon: Attachment
    beacon_embedding: nn.Parameter

    # --- settings ---

    @property
    def beacon_config(self) -> BeaconConfig:
        """Settings of the adapter."""
        return self._beacon.config

    @property
    def beacon_ratio(self) -> Ratio:
        """Ratio that is used where a call names none: "auto" unless set."""
        return self._beacon.policy.ratio

    @beacon_ratio.setter
    def beacon_ratio(self, ratio: Ratio) -> None:
        self._beacon.policy = self.ratio_policy(ratio)

    @property
    def local_tokens(self) -> int:
        """Raw tokens that tails of new contexts keep at least when a chunk is closed; the adapter's unless set (0 in the paper).

        They hold the wording right before a text's next token, which beacons blur. `beacon_config` follows, and with it what
        `save_pretrained` writes; a context keeps the number that it began with.

        Raises:
            ConfigError: where it is set to a number that is no number of tokens, or that the base has not the positions for.
        """
        return self._beacon.config.local_tokens

    @local_tokens.setter
    def local_tokens(self, number: int) -> None:
        self._beacon.config = self._config_with(number)

    def _config_with(self, local_tokens: int) -> BeaconConfig:
        """The adapter's settings with another number of local tokens."""
        config = dataclasses.replace(self._beacon.config, local_tokens=local_tokens)
        check_chunk_fits(config, self._beacon.site)
        return config

    @property
    def cuda_graphs(self) -> bool:
        """Whether steps of decoding are recorded as CUDA graphs and replayed; off unless set, and without effect on a CPU.

        Of use where a GPU waits for Python: with few texts at once. Read token by token, with `generate` or by calling the
        model, contexts are as ever; they take what a step needs of memory besides, while they are decoded from.
        """
        return self._beacon.cuda_graphs

    @cuda_graphs.setter
    def cuda_graphs(self, is_on: bool) -> None:
        self._beacon.cuda_graphs = is_on

    @property
    def cpu_matmul(self) -> str:
        """What multiplies float32 matrices on a CPU in passes on compressed texts: "onednn", "torch", or "auto" (unless set).

        "torch" is what torch takes by itself. "auto" tries both once in a process, for some tenths of a second, and takes the
        faster one; while other work on the machine holds up the threads that share a product, it leaves single steps to torch.
        Both are as precise. Short texts, of which nothing is compressed, and disabled beacons, are always left to torch.
        """
        return self._beacon.cpu_matmul

    @cpu_matmul.setter
    def cpu_matmul(self, choice: str) -> None:
        if choice not in CHOICES:
            raise ConfigError(f"cpu_matmul must be one of {', '.join(CHOICES)}; got {choice!r}.")
        if choice == "onednn" and not is_offered():
            raise UnsupportedError('This build of torch has no oneDNN. Use cpu_matmul = "auto" or "torch".')
        self._beacon.cpu_matmul = choice

    def is_by_onednn(self, num_rows: int) -> bool:
        """Whether matrix products of so many rows go through oneDNN in passes on compressed texts."""
        weight = self.get_input_embeddings().weight
        is_served = weight.device.type == "cpu" and weight.dtype is torch.float32
        return is_served and is_chosen(self._beacon.cpu_matmul, num_rows)

    def fast_products(self, num_rows: int) -> contextlib.AbstractContextManager[None]:
        """A block for a pass of so many rows, whose matrix products are made as `cpu_matmul` says."""
        if not self.is_by_onednn(num_rows):
            return contextlib.nullcontext()
        return products_of(self._beacon.state, self._beacon.cpu_matmul, num_rows)

    @property
    def untouched_length(self) -> int:
        """Tokens up to which no chunk is closed and outputs are the base model's."""
        return self._beacon.config.untouched_length

    @property
    def max_positions(self) -> int | None:
        """Positions that the base model was made for; None where it has no limit."""
        return self._beacon.site.max_positions

    def beacon_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names, as in the adapter's file, and parameters of all beacon weights: what is trained."""
        yield "embedding", self.beacon_embedding
        for index, layer in enumerate(self._beacon.site.layers):
            for site in layer.projections:
                beacon: BeaconProjection = site.linear.beacon  # type: ignore[assignment]
                for name, parameter in beacon.named_parameters():
                    yield f"layers.{index}.{site.name}.{name}", parameter

    @property
    def adapter_fingerprint(self) -> str:
        """Fingerprint of the beacon weights and of the settings that a compressed context depends on.

        Made anew each time, in milliseconds: fused optimisers change weights without a trace.
        """
        return fingerprint(self.beacon_parameters(), self._beacon.config.fingerprint_settings)

    @property
    def base_fingerprint(self) -> str:
        """Fingerprint of the base model's weights, made anew when torch has noted a change of these; they are frozen."""
        if self._beacon.quantised_base is not None:
            return self._beacon.quantised_base
        tensors = list(base_weights(self))
        version = _versions(tensor for _, tensor in tensors)
        known = self._beacon.known_base
        if known is None or known[0] != version:
            known = self._beacon.known_base = (version, fingerprint(tensors))
        return known[1]

    @contextlib.contextmanager
    def beacon_disabled(self) -> Iterator[None]:
        """Within the block, and in this thread, the model is the base model, bit for bit."""
        state = self._beacon.state
        before, state.is_disabled = state.is_disabled, True
        try:
            yield
        finally:
            state.is_disabled = before

    # --- contexts ---

    def ratio_policy(
        self, ratio: Ratio = "auto", *, budget: int | None = None, spans: Sequence[Sequence[int | None]] = ()
    ) -> RatioPolicy:
        """A checked ratio policy; see `compress` for the arguments."""
        return as_policy(self._beacon.config, ratio, budget=budget, spans=spans)

    def _revised(
        self,
        cache: BeaconCache,
        ratio: Ratio | None,
        budget: int | None = None,
        spans: Sequence[Sequence[int | None]] = (),
    ) -> tuple[RatioPolicy, ...]:
        """The policies of a cache with what a call names, if it names anything."""
        if ratio is None and budget is None and not len(spans):
            return cache.policies
        config = cache.config
        return tuple(revised(config, policy, ratio=ratio, budget=budget, spans=spans) for policy in cache.policies)

    def new_cache(
        self, batch_size: int = 1, *, ratio: Ratio | None = None, local_tokens: int | None = None
    ) -> BeaconCache:
        """An empty cache of this model and adapter, for `compress(cache=...)` and the like.

        Args:
            batch_size: texts that it is for.
            ratio: as in `compress`.
            local_tokens: by default the model's.
        """
        return BeaconCache(
            self._beacon.config if local_tokens is None else self._config_with(local_tokens),
            num_layers=len(self._beacon.site.layers),
            batch_size=batch_size,
            policy=self._beacon.policy if ratio is None else self.ratio_policy(ratio),
            base_fingerprint=self.base_fingerprint,
            adapter_fingerprint=self.adapter_fingerprint,
            device=self.get_input_embeddings().weight.device,
        )

    def check_context(self, context: BeaconCache) -> None:
        """Refuse a context that another base model or adapter has made.

        Raises:
            MismatchError: with both fingerprints.
        """
        for kind in ("base", "adapter"):
            theirs, ours = getattr(context, f"{kind}_fingerprint"), getattr(self, f"{kind}_fingerprint")
            if not is_same_fingerprint(theirs, ours):
                what = "base model" if kind == "base" else "adapter"
                raise MismatchError(
                    f"The context was made with another {what} (fingerprint {short_fingerprint(theirs)}, "
                    f"this one has {short_fingerprint(ours)}). "
                    "Compress the text again with this model, or load the one that made it."
                )

    def check_can_read_on(self, context: BeaconCache) -> None:
        """Refuse a context that is not this model's, or whose tensors are of another dtype or on another kind of device.

        Raises:
            MismatchError: with both values.
        """
        self.check_context(context)
        keys, weight = context.layers[0].keys, self.get_input_embeddings().weight
        if keys is None or torch.is_autocast_enabled(weight.device.type):
            return
        if (keys.device.type, keys.dtype) != (weight.device.type, weight.dtype):
            raise MismatchError(
                f"The context is held in {keys.dtype} on {keys.device}, the model in {weight.dtype} on {weight.device}. "
                "Use context.to(model.device, model.dtype)."
            )

    @torch.no_grad()
    def compress(
        self,
        input_ids: torch.Tensor | Sequence[int] | Sequence[Sequence[int]] | Mapping[str, Any],
        *,
        ratio: Ratio | None = None,
        attention_mask: torch.Tensor | None = None,
        budget: int | None = None,
        spans: Sequence[Sequence[int | None]] = (),
        cache: BeaconCache | None = None,
        progress: bool | Progress = False,
    ) -> BeaconCache:
        """Read texts and keep their chunks as beacons (section 3.1).

        Args:
            input_ids: (B, N) or (N,) ids, padded with `attention_mask`; or lists of ids, ragged as they are; or what a
                tokenizer returns.
            ratio: raw tokens per beacon: an int for all chunks; a sequence with one for each chunk of the whole text;
                "auto", the smallest of the adapter's ratios with which the text fits the base model's positions. When the
                text grows beyond what fits, "auto" chooses again and reads the text anew from the ids that are kept.
            attention_mask: (B, N) or (N,), 1 where there is a token; padding on either side.
            budget: with "auto", cache entries that a text may hold at most.
            spans: (start, stop, ratio) in tokens of the text: chunks there get at most that ratio; with None for ratio
                those tokens' keys and values are kept raw. They are added to those that the cache has; what has been
                compressed already is read anew with "auto" only.
            cache: go on where this one stands, in place; of its policy stays what is not named here.
            progress: True for a bar, or a function that is called with the chunks closed and to be closed.

        Returns:
            The cache. The text's last tokens stay raw in its tail: a chunk is closed when a further token is read behind
                it and the local tokens.

        Raises:
            InputError: for an empty text, or ids outside the vocabulary.
            RatioError, CapacityError: before anything is read.
            MismatchError: if `cache` comes from another model.
        """
        self._refuse_disabled()
        if not isinstance(input_ids, torch.Tensor):
            input_ids, own_mask = as_batch(input_ids)
            attention_mask = own_mask if attention_mask is None else attention_mask
        if input_ids.dim() == 1:
            input_ids = input_ids[None]
        if attention_mask is not None:
            attention_mask = torch.atleast_2d(as_tensor(attention_mask))
        self._refuse_checkpointing()
        cache = self._opened(cache, input_ids)
        policies = self._revised(cache, ratio, budget, spans)
        for row, held, policy in zip(cache.rows, cache.policies, policies, strict=True):
            late = [span for span in policy.spans if span not in held.spans]
            TextPlanner(cache.config, policy, None).check_are_ahead(row, late)
        new = self._new_tokens(input_ids, attention_mask)
        if new.columns == 1:  # more have been looked at
            self._check_vocabulary(new.ids)
        with _under_policies(cache, policies), _progress_bar(progress) as report:
            self._check_names_every_chunk(cache, new)
            read(self, self._beacon.site, cache, new, Wanted(), progress=report)
        return cache

    @torch.no_grad()
    def read_next(self, contexts: Sequence[BeaconCache], token_ids: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Read one more token in each of several contexts, as one batch without padding; in place.

        Each context goes on as it would alone, whatever its length, ratios or quantisation, and may be put aside or joined
        by others between two tokens, which copies nothing. Contexts whose next token closes a chunk are read one after another, and so
        are all of them where attention is not torch's own ("sdpa") or the family is not among the tested ones.

        Args:
            contexts: of one row each, no two the same.
            token_ids: one for each, (B,).

        Returns:
            Logits (B, V) of the tokens that come next.

        Raises:
            InputError: if the numbers differ, a context has several rows or is given twice.
            RatioError, CapacityError, MismatchError: before anything is read.
        """
        self._refuse_disabled()
        self._refuse_checkpointing()
        ids = as_tensor(token_ids)
        if ids.dim() != 1 or len(ids) != len(contexts) or not contexts:
            raise InputError(
                f"read_next wants one token for each context; got ids {tuple(ids.shape)} for {len(contexts)} contexts."
            )
        if len(set(map(id, contexts))) < len(contexts):
            raise InputError("read_next got the same context twice. Give a fork() of it.")
        ids = as_ids(ids)
        self._check_ids(ids[:, None])
        device = self.get_input_embeddings().weight.device
        ids = ids.to(device) if isinstance(token_ids, torch.Tensor) else sent(ids, device)
        weights = self._weights_now()
        for context, token in zip(contexts, ids.split(1), strict=True):
            self._opened(context, token[None], weights)
        return read_next(self, self._beacon.site, contexts, ids)

    def _opened(
        self, cache: BeaconCache | None, input_ids: torch.Tensor, weights: int | str | None = None
    ) -> BeaconCache:
        """The cache to read on, a new one where there is none; compared with the model's weights (`_weights_now`)."""
        if input_ids.dim() != 2 or input_ids.shape[0] == 0:
            raise InputError(f"input_ids must be (B, N) with at least one row; got {tuple(input_ids.shape)}.")
        if cache is None:
            cache = self.new_cache(input_ids.shape[0])
        else:
            if weights is None:
                weights = self._beacon.token if cache.stays_raw(input_ids.shape[1]) else self._weights_now()
            if input_ids.shape[1] > 1 or cache.checked_by != weights:  # not again at every decode step
                self.check_can_read_on(cache)
                cache.follow([layer.device for layer in self._beacon.site.layers])
                cache.checked_by = weights
        if cache.batch_size != input_ids.shape[0]:
            raise InputError(
                f"The cache has {cache.batch_size} rows, the ids {input_ids.shape[0]}. Give as many of each."
            )
        return cache

    def _weights_now(self) -> int:
        """Another number after training, and for another model: what a cache remembers instead of a fingerprint at each step."""
        tensors = [self.beacon_embedding]
        for layer in self._beacon.site.layers:
            for site in layer.projections:  # as beacon_parameters, without names: once for each token
                beacon: BeaconProjection = site.linear.beacon  # type: ignore[assignment]
                tensors += [tensor for tensor in beacon._parameters.values() if tensor is not None]
        return hash((self._beacon.token, _versions(tensors)))

    def train(self, mode: bool = True) -> Any:
        """As in torch; contexts are compared with the weights again after it, since fused optimisers leave no trace."""
        if mode:
            self._beacon.token = new_token()
        return super().train(mode)

    def _check_names_every_chunk(self, cache: BeaconCache, new: NewTokens) -> None:
        for row, policy, count in zip(cache.rows, cache.policies, new.counts, strict=True):
            TextPlanner(cache.config, policy, None).check_names_every_chunk(row.tokens_seen + count)

    def _new_tokens(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> NewTokens:
        input_ids = as_ids(input_ids).to(self.get_input_embeddings().weight.device)
        batch, width = input_ids.shape
        if width == 0:
            raise InputError("The text is empty: there is no token to read. Give at least one.")
        self._check_ids(input_ids)
        if attention_mask is None:
            return NewTokens(input_ids, [0] * batch, [width] * batch)
        if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < width:
            raise InputError(
                f"attention_mask must be (B, N) like the ids {tuple(input_ids.shape)}; got {tuple(attention_mask.shape)}."
            )
        return NewTokens(input_ids, *runs(attention_mask[:, -width:]))

    def _check_ids(self, input_ids: torch.Tensor) -> None:
        """Refuse ids of no token; on a GPU a step of decoding does not wait for the device to look at them."""
        if input_ids.shape[-1] > 1 or input_ids.device.type == "cpu":
            self._check_vocabulary(input_ids)

    def _check_vocabulary(self, input_ids: torch.Tensor) -> None:
        size = self.get_input_embeddings().weight.shape[0]
        least, most = torch.stack(input_ids.aminmax()).tolist()
        if least < 0 or most >= size:
            raise InputError(
                f"Token ids must be within 0..{size - 1}; got {least if least < 0 else most}. Use the model's own tokenizer."
            )

    def _check_labels(self, labels: torch.Tensor) -> None:
        """Refuse targets of no token before anything is read."""
        size = self.get_input_embeddings().weight.shape[0]
        wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= size))]
        if wrong.numel():
            raise InputError(
                f"labels must be token ids within 0..{size - 1}, or {IGNORED} where none is; got {int(wrong[0])}. Check them."
            )

    def _refuse_checkpointing(self) -> None:
        if self.training and any(getattr(module, "gradient_checkpointing", False) for module in self.modules()):
            raise UnsupportedError(
                "Gradient checkpointing drops the caches that chunks are read on. Call eval() or gradient_checkpointing_disable()."
            )

    def _refuse_disabled(self) -> None:
        if self._beacon.state.is_disabled:
            raise UnsupportedError("Beacons are disabled here. Leave the beacon_disabled() block first.")

    # --- forward ---

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
        if cache is None and beacon_ratio is None and self._is_for_the_base(input_ids, attention_mask, position_ids):
            return _with_nll(self.base_forward(input_ids, **given, **kwargs), labels)
        keep_cache = cache is not None or self._keeps_cache(use_cache)
        cache = self._opened(cache, input_ids)
        new = self._new_tokens(input_ids, attention_mask)
        is_short = cache.num_slots == 0 and max(new.counts) <= cache.config.untouched_length
        if labels is not None and (keep_cache or not is_short):
            self._check_labels(labels)
        if keep_cache or not is_short:
            self._refuse_checkpointing()
        with _under_policies(cache, self._revised(cache, beacon_ratio)):
            if beacon_ratio is not None:
                self._check_names_every_chunk(cache, new)
            if is_short:
                output = self._forward_short(input_ids, cache if keep_cache else None, new, given, kwargs)
            else:
                output = self._forward_long(cache, new, given, kwargs, keep_cache=keep_cache)
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
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> bool:
        """Whether a text that no chunk is closed of comes with a mask or positions that only the base can make sense of."""
        if input_ids.dim() != 2 or input_ids.shape[1] > self.untouched_length:
            return False
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            return False
        if attention_mask is not None and not has_one_run_each(attention_mask):
            return True
        return position_ids is not None and not _count_up(position_ids, self._new_tokens(input_ids, attention_mask))

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
        if cache is not None:
            _refuse_packed(given["position_ids"], new)
        labels = given["labels"]
        is_padded = any(count < new.columns for count in new.counts)
        inputs = dict(given, labels=None if is_padded else labels)
        if labels is not None:
            inputs["logits_to_keep"] = 0
        if self.training and not self._keeps_cache(given["use_cache"]):
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
                cache.truncate(0)
            raise
        return _as_ours(output, loss, nll)

    def _move_to_origin(self, cache: BeaconCache, new: NewTokens, position_ids: torch.Tensor | None) -> None:
        """Move what the base has read behind padding to the positions that it holds: each row begins at 0."""
        first = new.starts
        if position_ids is not None:
            rows = position_ids.expand(len(new.starts), -1)
            first = [int(rows[row, start]) for row, start in enumerate(new.starts)]
        if not any(first):
            return
        for layer, rope in zip(cache.layers, self._beacon.site.ropes, strict=True):
            if rope is not None and layer.keys is not None:
                cos, sin = rope.rotation(sent(first, layer.keys.device).neg())
                layer.keys = rope.move(layer.keys, (cos.transpose(0, 1), sin.transpose(0, 1)))

    def _forward_long(
        self, cache: BeaconCache, new: NewTokens, given: dict[str, Any], kwargs: dict[str, Any], *, keep_cache: bool
    ) -> BeaconOutput:
        refuse_other_inputs({name: value for name, value in kwargs.items() if name != "num_items_in_batch"})
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

    # --- files ---

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copied and pickled by way of the base's class, which stands in a module; ours is made when it is needed."""
        return _made_empty, (self._beacon.base_class,), vars(self)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write the adapter: `beacon_config.json`, `beacon.safetensors` and a model card. The base is not written.

        Args:
            save_directory: folder, made if missing.
            kwargs: `max_shard_size` as in transformers; its other options concern base models and are ignored.

        Raises:
            UnsupportedError: for `push_to_hub`.
        """
        if kwargs.get("push_to_hub"):
            raise UnsupportedError("save_pretrained writes a folder only. Use model.push_to_hub(repo_id).")
        tensors = {name: parameter.detach() for name, parameter in self.beacon_parameters()}
        shard_size = kwargs.get("max_shard_size", "5GB")
        save_adapter(save_directory, self._beacon.config, tensors, max_shard_size=shard_size)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None, **kwargs: Any) -> str:
        """Write the adapter to the hub.

        Args:
            repo_id: such as "me/my-adapter"; made if missing.
            private, token: as in huggingface_hub.
            kwargs: further arguments of `HfApi.upload_folder`, such as `commit_message` or `revision`.

        Returns:
            The address of the commit.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **kwargs))


# --- attach and detach -------------------------------------------------------------------------------------------------


def attach(base_model: PreTrainedModel, config: BeaconConfig | None = None) -> Any:
    """Put untrained beacons on a model: the same object, which now compresses long texts.

    The base's weights are frozen and stay as they are; beacon weights start as copies of its projections, the beacon's
    embedding as that of its eos (or bos) token.

    Args:
        base_model: a decoder with a language modelling head.
        config: settings of the adapter.

    Returns:
        `base_model`, with `compress`, `generate(context=...)` and the rest of `BeaconModel`.

    Raises:
        AttachError: if it carries beacons already, or not all of its weights are in memory.
        UnsupportedModelError: if its architecture cannot carry beacons.
        ConfigError: if a chunk does not fit its positions, or `exact_ids` names no tokens, or others than its own.
        MismatchError: if the config names the fingerprint of another base model, unless this one is quantised: then a warning.
    """
    config = config or BeaconConfig()
    if config.exact_ids == "digits":
        raise ConfigError(
            'exact_ids ("digits") names no tokens yet. Give dataclasses.replace(config, exact_ids=digit_ids(tokenizer)).'
        )
    if isinstance(base_model, BeaconModel):
        raise AttachError(f"This {type(base_model).__name__} carries beacons already. Call detach(model) first.")
    check_in_memory(base_model)
    num_ids = base_model.get_input_embeddings().weight.shape[0]
    if config.exact and max(config.exact) >= num_ids:
        raise ConfigError(
            f"exact_ids names {max(config.exact)}, but the base model has {num_ids} tokens. Use digit_ids of its own tokenizer."
        )
    site = find_decoder(base_model, config.projections)
    check_chunk_fits(config, site)
    base_print, has_packed_weights = fingerprint(base_weights(base_model)), is_quantised(base_model)
    _check_base(config, base_print, has_packed_weights=has_packed_weights)
    attachment = Attachment(
        config=with_base(config, base_model, base_print),
        site=site,
        state=PassState(),
        base_class=type(base_model),
        frozen=[parameter for parameter in base_model.parameters() if parameter.requires_grad],
        handles=[],
        own_forward=vars(base_model).pop("forward", None),
        policy=RatioPolicy(),
        quantised_base=base_print if has_packed_weights else None,
    )
    base_model._beacon = attachment
    try:
        base_model.requires_grad_(False)
        put_on(base_model, attachment)
        base_model.beacon_embedding = nn.Parameter(first_embedding(base_model))
        base_class: Any = attachment.base_class
        base_model.__class__ = _beacon_class(base_class)
    except BaseException:
        take_off(base_model, attachment)
        raise
    return base_model


def _check_base(config: BeaconConfig, base_print: str, *, has_packed_weights: bool) -> None:
    """Refuse another base than the adapter was made for. Of one that has been quantised nothing tells what it was: a warning.

    Raises:
        MismatchError: with both fingerprints.
    """
    made_for = config.base_fingerprint
    if made_for is None or is_same_fingerprint(made_for, base_print):
        return
    prints = f"fingerprint {short_fingerprint(made_for)}, this one has {short_fingerprint(base_print)}"
    if not has_packed_weights:
        raise MismatchError(
            f"The adapter was made for another base model ({prints}). "
            f"Load the base that beacon_config.json names: {config.base_model}."
        )
    logger.warning(
        "The base is quantised: it is taken to be %s, which the adapter was made for (%s).", config.base_model, prints
    )


def detach(model: Any) -> PreTrainedModel:
    """Take everything off that `attach` put on: the old class, parameters and state-dict keys.

    Returns:
        The same object.

    Raises:
        AttachError: if it carries no beacons.
    """
    if not isinstance(model, BeaconModel):
        raise AttachError(f"This {type(model).__name__} carries no beacons. Call attach(model) first.")
    take_off(model, model._beacon)
    return model


@functools.cache
def _beacon_class(base_class: Any) -> type:
    """The base's class with `BeaconModel` in front, under the same name: pipelines and configs go by it."""
    signature = inspect.signature(BeaconModel.forward)
    base_signature = inspect.signature(base_class.forward)
    ours = signature.parameters["beacon_ratio"]
    parameters = [p for p in base_signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    rest = [p for p in signature.parameters.values() if p.kind is inspect.Parameter.VAR_KEYWORD]

    own_forward = torch.compiler.disable(BeaconModel.forward)  # what plans in integers is nothing to trace

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own_forward(self, *args, **kwargs)

    forward.__doc__ = BeaconModel.forward.__doc__
    forward.__signature__ = base_signature.replace(parameters=[*parameters, ours, *rest])  # type: ignore[attr-defined]

    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return BeaconModel.prepare_inputs_for_generation(self, *args, **kwargs)

    # transformers asks by the signature what a model takes
    own = inspect.signature(base_class.prepare_inputs_for_generation)
    prepare_inputs_for_generation.__signature__ = own  # type: ignore[attr-defined]
    members: dict[str, Any] = {"__module__": base_class.__module__, "__doc__": base_class.__doc__, "forward": forward}
    members["prepare_inputs_for_generation"] = prepare_inputs_for_generation
    return type(base_class.__name__, (BeaconModel, base_class), members)


def _made_empty(base_class: Any) -> Any:
    """A model of the base's class with `BeaconModel` in front, without anything in it yet."""
    made: Any = _beacon_class(base_class)
    return made.__new__(made)


def _versions(tensors: Iterable[torch.Tensor]) -> int:
    """Another number when torch has noted a change of tensors, or when they are others (a copy, `load_state_dict(assign=True)`)."""
    return hash(tuple((id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in tensors))


# --- batches and losses ------------------------------------------------------------------------------------------------


def _note_read(cache: BeaconCache, new: NewTokens) -> None:
    """Enter into an empty cache what the base has just read into it, rows aligned at the right: all of it or nothing."""
    rows = tuple(row.after_reading(count) for row, count in zip(cache.rows, new.counts, strict=True))
    token_ids = new.right_aligned()
    if len(set(new.counts)) > 1 or new.counts[0] < new.columns:
        ends = [start + count for start, count in zip(new.starts, new.counts, strict=True)]
        cut = functools.partial(take, rows=range(len(ends)), ends=ends, length=max(new.counts), dim=2)
        cache.layers = [layer.map(cut) for layer in cache.layers]
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
    """Whether the positions of each row's tokens count up one by one."""
    for row, (start, count) in enumerate(zip(new.starts, new.counts, strict=True)):
        steps = position_ids[min(row, position_ids.shape[0] - 1), ..., start : start + count].diff()
        if steps.numel() and not bool((steps == 1).all()):
            return False
    return True


def _refuse_packed(position_ids: torch.Tensor | None, new: NewTokens) -> None:
    if position_ids is not None and not _count_up(position_ids, new):
        raise UnsupportedError(
            "position_ids that do not count up (packed sequences) cannot be compressed. Leave them out."
        )


@contextlib.contextmanager
def _under_policies(cache: BeaconCache, policies: tuple[RatioPolicy, ...]) -> Iterator[None]:
    """A reading of `cache` under these policies, which it keeps; on an error it has its own again."""
    before, cache.policies = cache.policies, policies
    try:
        yield
    except BaseException:
        cache.policies = before
        raise


def _refuse_other_names(kwargs: dict[str, Any]) -> None:
    for name, right in (("context", "past_key_values"), ("ratio", "beacon_ratio")):
        if name in kwargs:
            raise InputError(f"A model's forward calls it {right}, not {name}. Use model(..., {right}=...).")


@contextlib.contextmanager
def _progress_bar(progress: bool | Progress) -> Iterator[Progress | None]:
    if not isinstance(progress, bool):
        yield progress
    elif not progress:
        yield None
    else:
        with tqdm(total=None, desc="compressing", unit="chunk") as bar:

            def report(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield report
