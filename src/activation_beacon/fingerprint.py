"""Fingerprints of weights: short names for a base model and an adapter, the same in every float dtype.

A fingerprint samples every tensor and rounds to bfloat16, so that it takes milliseconds and does not depend on the dtype
that a model was loaded in. It tells models apart; it is no protection against someone who wants to deceive.
"""

import hashlib
from collections.abc import Iterable

import torch

SAMPLES = 32


@torch.no_grad()
def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]], settings: str = "") -> str:
    """A name of 16 hexadecimal digits for named tensors and the settings that they are used with."""
    digest = hashlib.sha256(settings.encode())
    samples = []
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        if tensor.device.type != "meta" and tensor.numel():
            samples.append(_sample(tensor))
    if samples:
        device = samples[0].device
        joined = torch.cat([sample.to(device) for sample in samples]).cpu()
        digest.update(joined.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    step = max(1, flat.numel() // SAMPLES)
    return flat[::step][:SAMPLES].float() + 0.0  # no negative zero
