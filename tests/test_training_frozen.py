from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from activation_beacon.training.frozen import without_dropout
from families import random_ids, tiny

DROPPING = {"residual_dropout": 0.3, "embedding_dropout": 0.3, "attention_dropout": 0.3}


class Dropping(GradientCheckpointingLayer):
    """Drops by itself, as some decoder layers do, and by a module."""

    def __init__(self):
        super().__init__()
        self.dropout, self.inner, self.linear = 0.5, nn.Dropout(0.5), nn.Linear(8, 8)

    def forward(self, states):
        return self.inner(nn.functional.dropout(self.linear(states), p=self.dropout, training=self.training))


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_nothing_is_dropped_within_the_block(is_checkpointed):
    base = tiny("starcoder2", **DROPPING)
    ids = random_ids(12)
    wanted = base(ids).logits
    base.train()
    before = modes(base)
    assert not torch.equal(base(ids).logits, wanted)
    if is_checkpointed:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with without_dropout(base):
        assert torch.equal(base(ids).logits, wanted)
    assert modes(base) == before


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_layer_that_drops_by_itself_does_not_and_is_checkpointed_all_the_same(is_checkpointed):
    layer, states = Dropping().train(), torch.ones(4, 8, requires_grad=True)
    layer.gradient_checkpointing = is_checkpointed
    layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    passes = []
    layer.linear.register_forward_pre_hook(lambda *_: passes.append(1))
    with without_dropout(layer):
        output = layer(states)
        assert torch.equal(output, nn.functional.linear(states, layer.linear.weight, layer.linear.bias))
        output.sum().backward()
    assert len(passes) == 1 + is_checkpointed
    assert layer.dropout == 0.5


@pytest.mark.parametrize("mode", [False, True])
def test_an_error_within_the_block_leaves_the_model_as_it_was(mode):
    base = tiny("starcoder2", **DROPPING).train(mode)
    base.model.layers[1].eval()
    base.model.layers[0].hidden_dropout = 0.2
    base.gradient_checkpointing_enable()
    before = modes(base)
    with pytest.raises(KeyError), without_dropout(base):
        raise KeyError
    assert modes(base) == before
    assert base.model.layers[0].hidden_dropout == 0.2
