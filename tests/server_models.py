"""A tiny model behind an engine that tests drive step by step, and what plain `generate` says to the same."""

import torch

from activation_beacon import BeaconConfig
from activation_beacon.server.engine import Engine, Limits
from activation_beacon.server.jobs import Done, Ended, Failed, Job, Piece
from activation_beacon.server.sampling import Sampling
from evaluation_models import OWN, byte_tokenizer
from families import with_beacons

CONFIG = BeaconConfig(chunk_size=16, ratios=(2, 4, 8), num_sinks=2)
GREEDY = Sampling(max_tokens=24, temperature=0.0)


def serving_model(config=CONFIG, *, family="llama", attention="sdpa", **overrides):
    """Never ends a text by itself, so that lengths are exact; `<|end|>` ends it where a test wants that."""
    own = {**OWN, "max_position_embeddings": 256, "eos_token_id": None, **overrides}
    return with_beacons(family, config, attention=attention, **own)


def engine_of(model, **limits):
    return Engine(model, byte_tokenizer(), Limits(**limits))


class Heard:
    """A job's events, as they came."""

    def __init__(self, engine, context, ids, *samplings, seconds=None):
        self.events = []
        self.job = Job(context, list(ids), self.events.append, samplings, seconds)
        engine.submit(self.job)

    @property
    def done(self):
        return next((event for event in self.events if isinstance(event, Done)), None)

    @property
    def cache(self):
        return None if self.done is None else self.done.cache

    @property
    def error(self):
        return next((event.error for event in self.events if isinstance(event, Failed)), None)

    @property
    def is_over(self):
        return self.cache is not None or self.error is not None

    def ids(self, number=0):
        return [e.chosen.token for e in self.events if isinstance(e, Piece) and e.number == number]

    def text(self, number=0):
        return "".join(e.text for e in self.events if isinstance(e, Piece | Ended) and e.number == number)

    def reason(self, number=0):
        return next(e.reason for e in self.events if isinstance(e, Ended) and e.number == number)


def run_until_over(engine, *heard, most=2000):
    for _ in range(most):
        if all(each.is_over for each in heard):
            return
        engine.step()
    raise AssertionError("the engine did not finish")


def plain(model, context, ids, num_tokens, **options):
    """What `generate` writes after `ids`, and the context that it leaves behind."""
    prompt = torch.tensor([list(ids)])
    if not options:
        options = {"do_sample": False}
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=num_tokens,
        return_dict_in_generate=True,
        **({} if context is None else {"context": context}),
        **options,
    )
    return out.sequences[0, len(ids) :].tolist(), out.past_key_values


def assert_same_cache(one, other, *, atol=2e-5):
    assert one.rows == other.rows
    assert one.policy == other.policy
    assert one.token_ids.tolist() == other.token_ids.tolist()
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        held = (dict(layer.dense().named_tensors()) for layer in (mine, theirs))
        for a, b in zip(*(tensors.values() for tensors in held), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)
