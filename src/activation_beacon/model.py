"""The face: attach beacons to a decoder, compress, ask, detach."""

import contextlib
import dataclasses
import functools
import inspect
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from activation_beacon.adapt import find_decoder
from activation_beacon.attachment import (
    Attachment,
    base_weights,
    check_chunk_fits,
    check_in_memory,
    check_placement,
    first_embedding,
    put_on,
    take_off,
    with_base,
)
from activation_beacon.batch import as_batch, as_ids, as_tensor
from activation_beacon.cache import BeaconCache
from activation_beacon.config import BeaconConfig, is_same_fingerprint, short_fingerprint
from activation_beacon.constants import sent
from activation_beacon.dense import is_quantised
from activation_beacon.errors import AttachError, ConfigError, InputError, MismatchError, UnsupportedError
from activation_beacon.fingerprint import fingerprint
from activation_beacon.forward import Progress, read
from activation_beacon.model_forward import BeaconForward
from activation_beacon.other_inputs import OF_TOKENIZERS, refuse_other_inputs, without_kinds_of_text
from activation_beacon.persistence import save_adapter
from activation_beacon.plan import TextPlanner
from activation_beacon.projection import PassState
from activation_beacon.ragged import read_next
from activation_beacon.ratios import Ratio, RatioPolicy
from activation_beacon.readout import Wanted

# B batch · N new tokens · V vocabulary · M model dim

logger = logging.getLogger(__name__)


class BeaconModel(BeaconForward):
    """What `attach` adds to a model; mixed in before its own class. The same object, still its own class to isinstance."""

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
            UnsupportedError: for pictures, sounds and the like in what a processor returns.
            RatioError, CapacityError: before anything is read.
            MismatchError: if `cache` comes from another model.
        """
        self._refuse_disabled()
        if isinstance(input_ids, Mapping):
            told = {name: value for name, value in input_ids.items() if name not in {"input_ids", *OF_TOKENIZERS}}
            refuse_other_inputs(without_kinds_of_text(told))
        if not isinstance(input_ids, torch.Tensor):
            input_ids, own_mask = as_batch(input_ids)
            attention_mask = own_mask if attention_mask is None else attention_mask
        if input_ids.dim() == 1:
            input_ids = input_ids[None]
        if attention_mask is not None:
            attention_mask = torch.atleast_2d(as_tensor(attention_mask))
        self._refuse_checkpointing()
        cache = self._opened(cache, input_ids)
        policies = self.revised_policies(cache, ratio, budget, spans)
        for row, held, policy in zip(cache.rows, cache.policies, policies, strict=True):
            TextPlanner(cache.config, policy, None).check_are_ahead(row, held.spans)
        new = self._new_tokens(input_ids, attention_mask)
        if new.columns == 1:  # more have been looked at
            self._check_vocabulary(new.ids)
        with cache.under(policies), _progress_bar(progress) as report:
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
        AttachError: if it carries beacons already, is no model of transformers, or not all of its weights are in memory.
        UnsupportedModelError: if its architecture cannot carry beacons.
        ConfigError: if a chunk does not fit its positions, or `exact_ids` names no tokens, or others than its own.
        MismatchError: if the config names the fingerprint of another base model, unless this one is quantised: then a warning.
    """
    is_named = config is not None
    config = config or BeaconConfig()
    if config.exact_ids == "digits":
        raise ConfigError(
            'exact_ids ("digits") names no tokens yet. Give dataclasses.replace(config, exact_ids=digit_ids(tokenizer)).'
        )
    if isinstance(base_model, BeaconModel):
        raise AttachError(f"This {type(base_model).__name__} carries beacons already. Call detach(model) first.")
    if not isinstance(base_model, PreTrainedModel):
        raise AttachError(
            f"Beacons are attached to a model of transformers; got {type(base_model).__name__}. Give the model inside it, "
            "and wrap or compile that afterwards."
        )
    check_in_memory(base_model)
    site = find_decoder(base_model, config.projections)
    if site.is_recurrent and not is_named:
        config = dataclasses.replace(config, placement="append")
    num_ids = base_model.get_input_embeddings().weight.shape[0]
    if config.exact and max(config.exact) >= num_ids:
        raise ConfigError(
            f"exact_ids names {max(config.exact)}, but the base model has {num_ids} tokens. Use digit_ids of its own tokenizer."
        )
    check_placement(config, site)
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

    names = [parameter.name for parameter in parameters[1:]]  # without self

    own_forward = torch.compiler.disable(BeaconModel.forward)  # what plans in integers is nothing to trace

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) > len(names):
            raise TypeError(f"{base_class.__name__}.forward takes {len(names)} arguments; got {len(args)}")
        return own_forward(self, **dict(zip(names, args, strict=False)), **kwargs)  # in the base's order, not in ours

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
