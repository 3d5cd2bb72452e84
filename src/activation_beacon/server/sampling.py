"""How a token is chosen among logits, and how likely it was."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from activation_beacon.grammar import Matcher

# V vocabulary


@dataclass(frozen=True)
class Sampling:
    """How an answer is written.

    Attributes:
        max_tokens: tokens at most.
        temperature: 0 always takes the likeliest token.
        top_p: the likeliest tokens that together reach this probability are drawn from.
        top_k: as many tokens at most are drawn from; None for all.
        seed: of the drawing; None for another one each time.
        frequency_penalty, presence_penalty: taken off a logit for each time, and once, that the token has been written.
        logit_bias: added to the logits of tokens.
        stop: texts that end an answer and are not part of it.
        num_likeliest: how many of the likeliest tokens are reported beside each one; None for no probabilities at all.
        grammar: what the answer keeps to, whatever else is asked for; None for any text.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    num_likeliest: int | None = None
    grammar: Matcher | None = None


@dataclass(frozen=True)
class Chosen:
    """A token and, where asked for, its log probability and those of the likeliest tokens."""

    token: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one answer.

    Args:
        sampling: how.
        number: of the answer among those of its request: each draws differently from one seed.
    """

    def __init__(self, sampling: Sampling, number: int = 0) -> None:
        self.sampling = sampling
        self.written: Counter[int] = Counter()
        self.matcher = None if sampling.grammar is None else sampling.grammar.copy()
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(_mixed(sampling.seed, number))

    def choose(self, logits: torch.Tensor) -> Chosen:
        """Choose after logits (V,), floats on the host."""
        adjusted = self._adjusted(logits)
        token = self._token(adjusted if self.matcher is None else self.matcher.masked(adjusted))
        if self.matcher is not None:
            self.matcher.add(token)
        self.written[token] += 1
        return self._reported(logits, token)

    @property
    def is_finished(self) -> bool:
        """Whether the grammar, if there is one, lets nothing follow."""
        return self.matcher is not None and self.matcher.is_finished

    def _adjusted(self, logits: torch.Tensor) -> torch.Tensor:
        sampling = self.sampling
        if sampling.logit_bias or sampling.frequency_penalty or sampling.presence_penalty:
            logits = logits.clone()
        for token, bias in sampling.logit_bias.items():
            logits[token] += bias
        if sampling.frequency_penalty or sampling.presence_penalty:
            for token, count in self.written.items():
                logits[token] -= sampling.frequency_penalty * count + sampling.presence_penalty
        return logits

    def _token(self, logits: torch.Tensor) -> int:
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        probabilities = probabilities_of(logits, self.sampling)
        return int(torch.multinomial(probabilities, 1, generator=self.generator))

    def _reported(self, logits: torch.Tensor, token: int) -> Chosen:
        """Probabilities are the model's own: before temperature, penalties, biases and grammars."""
        count = self.sampling.num_likeliest
        if count is None:
            return Chosen(token)
        logprobs = logits.log_softmax(-1)
        values, tokens = logprobs.topk(count)
        return Chosen(token, float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))


def _mixed(seed: int, number: int) -> int:
    """A seed for one of several answers, which no other request's seed gives its own first one."""
    if number == 0:
        return seed % 2**63
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:8]) % 2**63


def probabilities_of(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Probabilities (V,) to draw with at a temperature above 0; 0 for what top_k and top_p leave out."""
    logits = (logits - logits.max()) / max(sampling.temperature, 1e-5)
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], -torch.inf)
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= sampling.top_p, 0.0)
        ordered[0] = ordered[0].clamp(min=torch.finfo(ordered.dtype).tiny)  # top_p=0 leaves the likeliest
        probabilities = torch.zeros_like(probabilities).scatter(0, order, ordered)
    return probabilities
