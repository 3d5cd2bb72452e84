"""Latent attention (DeepSeek): what is cached is a latent and one shared key, and so is what beacons leave behind."""

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, apply_rotary_pos_emb_interleave

from activation_beacon import BeaconCache, BeaconConfig, attach, load
from activation_beacon.bench.cost import ModelShape
from activation_beacon.errors import UnsupportedError, UnsupportedModelError
from families import LATENT, beacon_tensors, random_ids, tiny, with_beacons

CONFIG = BeaconConfig(chunk_size=16, ratios=(2, 4, 8), num_sinks=3, anchored=True, placement="append")
EXPAND = DeepseekV3Attention.expand_kv
FAMILIES = ("deepseek_v2", "deepseek_v3")  # the former turns neighbouring dims, and has latents of queries too


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return with_beacons(request.param, CONFIG, attention="sdpa")


def same(one: BeaconCache, other: BeaconCache, atol: float = 0.0) -> None:
    assert one.rows == other.rows
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        for name in ("keys", "values"):
            torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), rtol=0, atol=atol)


def test_a_beacon_leaves_a_latent_and_one_key_for_all_heads(model):
    context = model.compress(random_ids(53), ratio=4)
    for layer in context.layers:
        assert layer.keys.shape[1::2] == (1, LATENT["kv_lora_rank"])
        assert layer.values.shape[1::2] == (1, LATENT["qk_rope_head_dim"])
    per_entry = 3 * 4 * (LATENT["kv_lora_rank"] + LATENT["qk_rope_head_dim"])
    assert context.cache_bytes == context.cache_length * per_entry
    assert model._beacon.site.features_held(lambda _: 1) * 4 == per_entry


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_and_latents_have_a_beacon_copy(family):
    names = {name.split(".", 2)[-1] for name, _ in with_beacons(family, CONFIG).beacon_parameters()}
    assert names == {"embedding", "q.weight", "q.gate", "kv.weight", "kv.gate"}
    first = with_beacons(family, CONFIG)._beacon.site.layers[0].projections
    assert [site.name for site in first] == ["kv", "q"]
    assert first[1].linear.out_features == (12 if family == "deepseek_v2" else 4 * 12)


def test_keys_or_values_alone_have_no_projection_of_their_own():
    with pytest.raises(UnsupportedModelError, match="layer 0 has no projection k of its own"):
        attach(tiny("deepseek_v3"), BeaconConfig(chunk_size=16, ratios=(2, 4, 8), projections=("q", "k")))


def test_contexts_go_through_files_batches_and_beams(model, tmp_path):
    context = model.compress(random_ids(53), ratio=4)
    context.save(tmp_path / "c.beacon")
    same(BeaconCache.load(tmp_path / "c.beacon", model), context)
    short = model.compress(random_ids(21, 1), ratio=2)
    both = BeaconCache.stack([context, short])
    same(both.row(0), context)
    same(both.row(1), short)
    question = random_ids(5, 2)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    alone = [model.generate(question, context=each, **options) for each in (context, short)]
    together = model.generate(question.repeat(2, 1), context=both, **options)
    assert torch.equal(together, torch.cat(alone))
    beams = model.generate(question, context=context, num_beams=3, **options)
    whole = torch.cat((context.token_ids, question), dim=1)
    assert torch.equal(beams, model.generate(whole, beacon_ratio=4, num_beams=3, **options)[:, 53:])
    packed = context.quantize(8)
    assert packed.cache_bytes < context.cache_bytes
    logits = [model(question, past_key_values=each.fork()).logits for each in (context, packed)]
    assert 0 < (logits[0] - logits[1]).abs().max() < 0.1 * logits[0].abs().max()


def test_adapters_go_through_files(model, tmp_path):
    base = tiny(model.config.model_type, attention="sdpa")
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    again, _ = load(str(tmp_path / "adapter"), base=str(tmp_path / "base"))
    for name, tensor in beacon_tensors(model).items():
        assert torch.equal(beacon_tensors(again)[name], tensor)
    same(again.compress(random_ids(53), ratio=4), model.compress(random_ids(53), ratio=4), atol=1e-5)


def test_padding_before_a_short_text_is_moved_away(model):
    """Keys that the base has read behind padding are moved to where the text begins."""
    ids = random_ids(9)
    padded = torch.cat((torch.zeros_like(ids[:, :4]), ids), dim=1)
    mask = (torch.arange(13) >= 4).long()[None]
    cache = model(padded, attention_mask=mask, use_cache=True).past_key_values
    same(cache, model.compress(ids), atol=1e-5)


class ExpandedAttention(DeepseekV3Attention):
    """As earlier releases of transformers had it: the keys and values of all heads are cached."""

    def forward(self, hidden_states, position_embeddings, attention_mask, past_key_values=None, **kwargs):
        batch, length = hidden_states.shape[:-1]
        queries = self.q_proj(hidden_states).view(batch, length, -1, self.qk_head_dim).transpose(1, 2)
        plain, turned = queries.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        latents, key = self.kv_a_proj_with_mqa(hidden_states).split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        turned, key = apply_rotary_pos_emb_interleave(turned, key[:, None], *position_embeddings)
        keys, values = EXPAND(self, self.kv_a_layernorm(latents)[:, None], key)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        whole = torch.cat((plain, turned), dim=-1)
        output, weights = attention(self, whole, keys, values, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(output.reshape(batch, length, -1)), weights


@pytest.mark.parametrize("has_the_method", [True, False])
def test_latent_attention_that_caches_something_else_is_refused(has_the_method, monkeypatch):
    """It was taken for a layer without positions once: its values are the same at each."""
    base = tiny("deepseek_v3", attention="sdpa")
    expected = base(random_ids(12)).logits
    for layer in base.model.layers:
        layer.self_attn.__class__ = ExpandedAttention
    torch.testing.assert_close(base(random_ids(12)).logits, expected)
    if not has_the_method:
        monkeypatch.delattr(DeepseekV3Attention, "expand_kv")
    with pytest.raises(UnsupportedModelError, match="keys of layer 0"):
        attach(base, CONFIG)


def test_what_it_costs_is_not_counted(model):
    with pytest.raises(UnsupportedError, match=r"^The operations of latent attention \(deepseek_v\d\) are not counted"):
        ModelShape.of(model.config, {})
