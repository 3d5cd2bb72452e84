"""What training minimises: how badly a model that has only beacons of earlier chunks predicts the next token.

Three parts, each a switch: cross-entropy with the text (section 3.2), divergence from what the uncompressed model itself
predicts on the same text (distillation), and a weight on tokens that need the context, those that the same chunk alone
predicts worse. Logits are made in slices and never all at once: their gradient is known in closed form, and the head is
frozen, so that a slice leaves behind nothing but the gradient of its hidden states.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from activation_beacon.at_once import chunks_at_once
from activation_beacon.constants import sent
from activation_beacon.errors import ConfigError, UnsupportedError
from activation_beacon.ratios import as_policy

# B batch · T tokens of a text · n tokens of a slice · M model dim · V vocabulary

MOST_ROUNDING = 0.1  # of logits, by which two ways to them may differ; a mixture of experts may choose others
SLICE_LOGITS = 512 * 49_152  # logits that are held at once


@dataclass(frozen=True)
class Objective:
    """Weights of the parts of the loss.

    Attributes:
        cross_entropy: of the text's own next token.
        distillation: Kullback-Leibler divergence from the uncompressed model's prediction; costs a pass without gradients.
        context_weight: extra weight of a token for each nat by which the full context predicts it better than its chunk
            alone does, at most 5; costs two passes without gradients.

    Raises:
        ConfigError: if a weight is negative, or nothing is left to minimise.
    """

    cross_entropy: float = 1.0
    distillation: float = 0.0
    context_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("cross_entropy", "distillation", "context_weight"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be at least 0; got {getattr(self, name)!r}.")
        if not self.cross_entropy + self.distillation > 0:
            raise ConfigError(
                "cross_entropy and distillation are both 0: nothing is left to minimise. Raise one of them."
            )

    @property
    def needs_teacher(self) -> bool:
        """Whether the uncompressed model has to read the text as well."""
        return self.distillation > 0 or self.context_weight > 0


@dataclass
class Losses:
    """The loss of a batch, and what it is made of.

    Attributes:
        total: scalar; the sum over targets, not their mean, so that batches of any size can be accumulated.
        cross_entropy: its sum over targets, whatever is minimised.
        nll: (B, T - 1) cross-entropy of each token in nats, without gradients; NaN where there is no target.
        divergence: sum over targets of the divergence from the uncompressed model; None without distillation.
        num_targets: tokens that count.
    """

    total: torch.Tensor
    cross_entropy: torch.Tensor
    nll: torch.Tensor
    divergence: torch.Tensor | None
    num_targets: torch.Tensor


def losses(
    model: Any,
    ids: torch.Tensor,
    is_target: torch.Tensor,
    ratios: Sequence[int],
    *,
    objective: Objective,
    chunk_size: int | None = None,
) -> Losses:
    """Read a batch with beacons and compare its predictions with what was asked for.

    Args:
        model: with beacons attached, in a block of `at_once.chunks_at_once`.
        ids: (B, T), padded on the right.
        is_target: (B, T), whether the prediction of a token counts. The first token has none. On the host, so that nobody waits
            for the GPU to know how many count.
        ratios: one for each closed chunk.
        objective: what to minimise.
        chunk_size: another than the adapter's.
    """
    chunk_size = chunk_size or model.beacon_config.chunk_size
    hidden = model.hidden_states(ids, ratios, chunk_size=chunk_size)[:, :-1]
    wanted = is_target[:, 1:]
    places = wanted.flatten().nonzero()[:, 0]
    index = places if places.device == ids.device else sent(places, ids.device)

    def chosen(values: torch.Tensor) -> torch.Tensor:
        return values.flatten(0, 1).index_select(0, index)

    targets = chosen(ids[:, 1:])
    teacher = weights = None
    if objective.needs_teacher:
        teacher_states = chosen(_uncompressed(model, ids)[:, :-1])
        if objective.distillation:
            teacher = teacher_states
        if objective.context_weight:
            alone = chosen(_alone(model, ids, chunk_size)[:, :-1])
            gains = _context_gains(model, alone, teacher_states, targets)
            weights = _context_weights(gains, wanted.sum(1).tolist(), objective.context_weight)
    total, parts = _SlicedLoss.apply(chosen(hidden), targets, teacher, weights, model, objective)
    nll = torch.full(wanted.shape, torch.nan, device=ids.device)
    nll.view(-1).index_copy_(0, index, parts[0])
    return Losses(total, parts[0].sum(), nll, parts[1].sum() if teacher is not None else None, wanted.sum())


def head(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits (n, V) of hidden states (n, M), as the base's own forward makes them."""
    config = model.config.get_text_config(decoder=True)
    logits = model.get_output_embeddings()(hidden)
    if (scale := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / scale
    if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * scale
    if (scale := getattr(config, "lm_head_multiplier", None)) is not None:  # Falcon-H1
        logits = logits * scale
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
        logits = torch.tanh(logits / cap) * cap
    return logits


@torch.no_grad()
def check_head(model: Any) -> None:
    """Make sure that `head` is what this base does after its decoder.

    Raises:
        UnsupportedError: if the base's own logits differ.
    """
    ids = torch.arange(8, device=model.get_input_embeddings().weight.device)[None]
    with model.beacon_disabled():
        own = model.base_forward(input_ids=ids, use_cache=False).logits[0].float()
        ours = head(model, model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]).float()
    if own.shape != ours.shape or not (own - ours).abs().max() <= 0.02 * own.abs().max():
        raise UnsupportedError(
            f"{type(model).__name__} does more after its decoder than is known here, so that its loss cannot be made in "
            "slices. Train it with your own loop: model(input_ids, labels=labels, beacon_ratio=...) is differentiable."
        )


@torch.no_grad()
def check_at_once(model: Any) -> None:
    """Make sure that all chunks in one pass give what chunk by chunk does: a family may put more into its masks than is known here.

    Raises:
        UnsupportedError: if the logits differ.
    """
    own = model.beacon_config
    unit, ratio = math.lcm(*own.ratios), own.ratios[-1]
    size = min(own.chunk_size, unit * max(2, math.ceil(own.num_sinks / unit)))
    config = dataclasses.replace(own, chunk_size=size, local_tokens=0)
    weight = model.get_input_embeddings().weight
    ids = torch.arange(2 * size + 8, device=weight.device)[None] % min(97, weight.shape[0])
    cache = model.cache_under(config, as_policy(config, ratio))
    by_chunk = model(ids, past_key_values=cache).logits[0].float()
    with chunks_at_once(model):
        states = model.hidden_states(ids, [ratio, ratio], chunk_size=size)
    at_once = head(model, states[0]).float()
    if not (by_chunk - at_once).norm() <= MOST_ROUNDING * by_chunk.norm():
        raise UnsupportedError(
            f"{type(model).__name__} puts more into its attention masks than is known here, so that its chunks cannot be read in one "
            "pass. Train it with your own loop: model(input_ids, labels=labels, beacon_ratio=...) is differentiable."
        )


@torch.no_grad()
def _uncompressed(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Hidden states (B, T, M) of the base itself on the whole text."""
    with model.beacon_disabled():
        return model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state


@torch.no_grad()
def _alone(model: Any, ids: torch.Tensor, size: int) -> torch.Tensor:
    """Hidden states (B, T, M) of the base on each chunk with nothing before it."""
    padded = nn.functional.pad(ids, (0, -ids.shape[1] % size))
    states = _uncompressed(model, padded.reshape(-1, size))
    return states.reshape(*padded.shape, -1)[:, : ids.shape[1]]


def _context_gains(model: Any, alone: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Nats (n,) by which the full context predicts each token better than its chunk alone, from 0 to 5."""
    pieces = [targets.new_zeros(0, dtype=torch.float32)]  # a batch may have no target at all
    for slot in _slices(model, len(targets)):
        nll = [
            nn.functional.cross_entropy(head(model, states[slot]).float(), targets[slot], reduction="none")
            for states in (alone, teacher)
        ]
        pieces.append((nll[0] - nll[1]).clamp(0, 5))
    return torch.cat(pieces)


def _context_weights(gains: torch.Tensor, lengths: Sequence[int], strength: float) -> torch.Tensor:
    """Weights (n,): larger for tokens that the context helps to predict, with mean 1 in each text of `lengths` targets.

    Not in all texts together: what a text teaches must not depend on those that are read with it.
    """
    return torch.cat([weights / weights.mean() for weights in (1 + strength * gains).split(lengths)])


def _slices(model: Any, length: int) -> list[slice]:
    size = max(1, SLICE_LOGITS // model.get_output_embeddings().weight.shape[0])
    return [slice(first, min(first + size, length)) for first in range(0, length, size)]


class _SlicedLoss(torch.autograd.Function):
    """The weighted sum of losses over tokens, with the gradient of the hidden states made on the way forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        teacher: torch.Tensor | None,
        weights: torch.Tensor | None,
        model: Any,
        objective: Objective,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss (scalar), and of each token its cross-entropy and divergence (2, n)."""
        gradient = torch.zeros_like(hidden)
        parts = hidden.new_zeros((2, len(targets)), dtype=torch.float32)
        total = hidden.new_zeros((), dtype=torch.float32)
        for slot in _slices(model, len(targets)):
            weight = None if weights is None else weights[slot]
            teacher_states = None if teacher is None else teacher[slot]
            loss, parts[:, slot], gradient[slot] = _slice(
                model, hidden[slot], targets[slot], teacher_states, weight, objective
            )
            total += loss
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(parts)
        return total, parts

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient made before, times that of the total."""
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0].to(gradient.dtype), None, None, None, None, None


def _slice(
    model: Any,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    teacher: torch.Tensor | None,
    weights: torch.Tensor | None,
    objective: Objective,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss (scalar), parts (2, n) and gradient of the hidden states (n, M) of one slice.

    With p the prediction and t the teacher's, the gradient of the logits is (a + b) p - a onehot - b t.
    """
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        logits = head(model, leaf)
    scores = logits.detach().float()
    log_p = torch.log_softmax(scores, dim=-1)
    nll = -log_p.gather(1, targets[:, None])[:, 0]
    slope = log_p.exp().mul_(objective.cross_entropy + objective.distillation)
    slope.scatter_add_(1, targets[:, None], slope.new_full((len(targets), 1), -objective.cross_entropy))
    divergence = torch.zeros_like(nll)
    if teacher is not None:
        log_t = torch.log_softmax(head(model, teacher).detach().float(), dim=-1)
        t = log_t.exp()
        divergence = torch.einsum("nv,nv->n", t, log_t.sub_(log_p))
        slope.sub_(t, alpha=objective.distillation)
    token_loss = objective.cross_entropy * nll + objective.distillation * divergence
    if weights is not None:
        token_loss = token_loss * weights
        slope.mul_(weights[:, None])
    (gradient,) = torch.autograd.grad(logits, leaf, slope.to(logits.dtype))
    return token_loss.sum(), torch.stack((nll, divergence)), gradient
