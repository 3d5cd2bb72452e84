"""Attach beacons to a model of your own. A tiny random Llama stands in for it here; nothing is fetched."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from activation_beacon import BeaconConfig, attach, detach

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
base = LlamaForCausalLM(
    LlamaConfig(vocab_size=1000, num_key_value_heads=2, max_position_embeddings=512, **sizes)
).eval()

model = attach(base, BeaconConfig(chunk_size=64, ratios=(2, 4, 8, 16), num_sinks=4))
texts = [torch.randint(0, 1000, (length,)).tolist() for length in (700, 450, 90)]

contexts = model.compress(texts, ratio=8)  # one ragged batch; each row is what it would be alone
print(contexts)

questions = torch.randint(0, 1000, (3, 5))
answers = model.generate(questions, context=contexts, max_new_tokens=10, do_sample=False)
print(answers.shape)

long_prompt = torch.randint(0, 1000, (1, 900))  # no context given: compressed on the way in, at a ratio that fits
print(model.generate(long_prompt, max_new_tokens=10, do_sample=False).shape)

out = model(long_prompt, labels=long_prompt, beacon_ratio=4)
out.loss.backward()  # gradients reach the beacon weights only
print(f"{out.loss.item():.3f} nats per token, {out.nll.shape[1]} of them")

with model.beacon_disabled():
    model(long_prompt[:, :100])  # the base model, bit for bit
detach(model)
