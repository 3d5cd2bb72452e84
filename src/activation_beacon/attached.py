"""What every part of an attached model builds on: its settings and fingerprints, its caches, and checks of what it is given."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from activation_beacon.attachment import Attachment, base_weights, check_chunk_fits, new_token
from activation_beacon.batch import IGNORED, NewTokens, as_ids, runs
from activation_beacon.cache import BeaconCache
from activation_beacon.config import BeaconConfig, is_same_fingerprint, short_fingerprint
from activation_beacon.context_checks import check_fits
from activation_beacon.errors import ConfigError, InputError, MismatchError, UnsupportedError
from activation_beacon.fingerprint import fingerprint
from activation_beacon.matmul import CHOICES, is_chosen, is_offered
from activation_beacon.plan import TextPlanner
from activation_beacon.projection import BeaconProjection, products_of
from activation_beacon.ratios import Ratio, RatioPolicy, as_policy, revised
from activation_beacon.sites import DecoderSite

if TYPE_CHECKING:
    from transformers import PreTrainedModel as Host
else:
    Host = object  # the base's own class comes after the mixin

# B batch · N new tokens


class Attached(Host):
    """Settings of an attached model, and what its readings have in common; mixed in before the base's class."""

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
    def decoder_site(self) -> DecoderSite:
        """The base's layers, as they are known here."""
        return self._beacon.site

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

    def revised_policies(
        self,
        cache: BeaconCache,
        ratio: Ratio | None,
        budget: int | None = None,
        spans: Sequence[Sequence[int | None]] = (),
    ) -> tuple[RatioPolicy, ...]:
        """The policies of a cache, one a row, with what a call names, if it names anything; see `compress` for the arguments."""
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
        config = self._beacon.config if local_tokens is None else self._config_with(local_tokens)
        policy = self._beacon.policy if ratio is None else self.ratio_policy(ratio)
        return self.cache_under(config, policy, batch_size)

    def cache_under(self, config: BeaconConfig, policy: RatioPolicy, batch_size: int = 1) -> BeaconCache:
        """`new_cache` under other settings than the adapter's, such as smaller chunks."""
        return BeaconCache(
            config,
            num_layers=len(self._beacon.site.layers),
            num_states=self._beacon.site.num_states,
            windows=self._beacon.site.windows,
            batch_size=batch_size,
            policy=policy,
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

    def placed(self, context: BeaconCache) -> BeaconCache:
        """A context that a file has held, on this model's device and in its dtype.

        Raises:
            MismatchError: if another base model or adapter made it.
            FileFormatError: if no context of this model can be so.
        """
        self.check_context(context)
        site, weight = self._beacon.site, self.get_input_embeddings().weight
        check_fits(context, site, weight.shape[0])
        moved = context.to(
            weight.device, weight.dtype
        )  # the model's own dtype is that of beacons that may be in training
        if moved.quantized_bits is None:  # what is quantised of an older file, which names no windows, stays as it is
            for index, window in site.windows.items():
                moved.layers[index].window = window
        return moved

    def check_can_read_on(self, context: BeaconCache) -> None:
        """Refuse a context that is not this model's, or whose tensors are of another dtype or on another kind of device.

        Raises:
            MismatchError: with both values.
        """
        self.check_context(context)
        windows = self._beacon.site.windows
        if context.windows and context.windows != windows:
            raise MismatchError(
                f"The context was made with sliding windows of {context.windows} (layer: entries), the model has {windows}, and may "
                "see what is not held. Compress the text again with this model."
            )
        keys, weight = context.dense_keys, self.get_input_embeddings().weight
        if keys is None or torch.is_autocast_enabled(weight.device.type):
            return
        if (keys.device.type, keys.dtype) != (weight.device.type, weight.dtype):
            raise MismatchError(
                f"The context is held in {keys.dtype} on {keys.device}, the model in {weight.dtype} on {weight.device}. "
                "Use context.to(model.device, model.dtype)."
            )

    # --- what is given ---

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


def _versions(tensors: Iterable[torch.Tensor]) -> int:
    """Another number when torch has noted a change of tensors, or when they are others (a copy, `load_state_dict(assign=True)`)."""
    return hash(tuple((id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in tensors))
