"""Fingerprints of weights: short names for a base model and an adapter, the same in whatever float dtype they are loaded.

A fingerprint samples every tensor, so that it takes milliseconds. It holds one name of the samples rounded to bfloat16
and, where that differs, one of the samples rounded to float16 first: weights that have been through either dtype are
recognised by one of the two. It tells models apart; it is no protection against someone who wants to deceive.
"""

import hashlib
from collections.abc import Iterable

import torch

from activation_beacon.config import FINGERPRINT_DIGITS
from activation_beacon.dense import parts

SAMPLES = 32


@torch.no_grad()
def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]], settings: str = "") -> str:
    """Name some named tensors and the settings that they are used with.

    Returns:
        Sixteen hexadecimal digits, or twice as many with a dash between them; compare with `config.is_same_fingerprint`.
    """
    digest = hashlib.sha256(settings.encode())
    samples = []
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        samples += [_sample(part) for part in parts(tensor) if part.device.type != "meta" and part.numel()]
    if not samples:
        return digest.hexdigest()[:FINGERPRINT_DIGITS]
    joined = _joined(samples).cpu()
    names = (_name(digest.copy(), rounded) for rounded in (joined, joined.to(torch.float16)))
    return "-".join(dict.fromkeys(names))


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: -(-flat.numel() // SAMPLES)]


def _joined(samples: list[torch.Tensor]) -> torch.Tensor:
    """All samples in one tensor of float32, without negative zeros; copied together where they are of one kind."""
    if len({(sample.dtype, sample.device) for sample in samples}) > 1:
        samples = [sample.to(samples[0].device).float() for sample in samples]
    return torch.cat(samples).float() + 0.0


def _name(digest: "hashlib._Hash", samples: torch.Tensor) -> str:
    rounded = samples.to(torch.bfloat16) + 0.0
    digest.update(rounded.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:FINGERPRINT_DIGITS]
