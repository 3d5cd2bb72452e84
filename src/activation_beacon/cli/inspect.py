"""`beacon inspect`: what a context file or an adapter holds, without loading a model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from activation_beacon.cli import options
from activation_beacon.cli.compress import cache_text, holding_text, numbers, ratios_text
from activation_beacon.cli.console import print_json, trained_fields
from activation_beacon.cli.models import adapter_at_hand, adapter_config, read_context
from activation_beacon.config import short_fingerprint
from activation_beacon.errors import StorageError
from activation_beacon.sizes import bytes_text

if TYPE_CHECKING:
    from activation_beacon.cache import BeaconCache
    from activation_beacon.config import BeaconConfig
    from activation_beacon.ratios import RatioPolicy


def inspect(
    target: Annotated[
        str, typer.Argument(metavar="FILE|ADAPTER", help='A context file, an adapter folder, or "default".')
    ],
    json: options.Json = False,
) -> None:
    """Say what a context or an adapter holds.

    No model is loaded. A context file is read whole and checked against its SHA-256.
    """
    path = Path(target).expanduser()
    if path.is_dir() or (target == "default" and not path.exists()):
        values, lines = _adapter(target)
    elif path.exists():
        values, lines = _context(path)
    else:
        raise StorageError(f"{target} does not exist. Name a context file, an adapter folder, or default.")
    if json:
        print_json(values)
    else:
        width = max(len(name) for name, _ in lines)
        typer.echo("\n".join([target, *(f"  {name:<{width}}  {text}" for name, text in lines)]))


# --- contexts --------------------------------------------------------------------------------------------------------


def _context(path: Path) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    context = read_context(path)
    rows = [context.row(index) for index in range(context.batch_size)]
    keys = context.dense_keys  # their dtype is that of all
    dtype = "none" if keys is None else str(keys.dtype).removeprefix("torch.")
    file_bytes = path.stat().st_size
    values = {
        "kind": "context",
        "file": str(path),
        "rows": [numbers(row) for row in rows],
        "cache_bytes": context.cache_bytes,
        "uncompressed_bytes": context.uncompressed_bytes,
        "file_bytes": file_bytes,
        "dtype": dtype,
        "quantized_bits": context.quantized_bits,
        "windows": context.windows,
        "ratio_policy": _policy_values(context.policies[0]),
        **({"ratio_policies": list(map(_policy_values, context.policies))} if len(set(context.policies)) > 1 else {}),
        "base_fingerprint": context.base_fingerprint,
        "adapter_fingerprint": context.adapter_fingerprint,
        **_settings(context.config),
    }
    bits = "" if context.quantized_bits is None else f", beacons in {context.quantized_bits} bits"
    lines = [("kind", "compressed context" + (f", a batch of {len(rows)}" if len(rows) > 1 else ""))]
    for row in rows:
        lines += [
            ("tokens seen", f"{row.tokens_seen:,} ({len(row.ratios)} chunks, {ratios_text(row.ratios)})"),
            ("held", f"{holding_text(row)} = {row.cache_length:,} entries"),
        ]
    if context.windows:
        lines.append(("windows", _windows_text(context)))
    lines += [
        ("cache", cache_text(context)),
        ("saved", bytes_text(max(0, context.uncompressed_bytes - context.cache_bytes))),
        ("file", bytes_text(file_bytes)),
        ("dtype", f"{dtype}{bits}"),
        ("next chunks", "; ".join(dict.fromkeys(map(_policy_text, context.policies)))),
        (
            "base",
            f"{context.config.base_model or 'unnamed'}, fingerprint {short_fingerprint(context.base_fingerprint)}",
        ),
        ("adapter", f"fingerprint {short_fingerprint(context.adapter_fingerprint)}"),
        *_setting_lines(context.config),
    ]
    return values, lines


def _windows_text(context: "BeaconCache") -> str:
    """Which layers hold less than others, and what."""
    windows = context.windows
    sizes = " or ".join(f"{window:,}" for window in sorted(set(windows.values())))
    return f"{len(windows)} of {len(context.layers)} layers see {sizes} entries, and hold no sinks and beacons beyond these"


def _policy_values(policy: "RatioPolicy") -> dict[str, Any]:
    return {"ratio": policy.ratio, "budget": policy.budget, "spans": policy.spans}


def _policy_text(policy: "RatioPolicy") -> str:
    ratio = ",".join(map(str, policy.ratio)) if isinstance(policy.ratio, tuple) else policy.ratio
    text = f"ratio {ratio}"
    if policy.budget is not None:
        text += f", at most {policy.budget:,} entries"
    return text + (f", {len(policy.spans)} spans of their own" if policy.spans else "")


# --- adapters --------------------------------------------------------------------------------------------------------


def _adapter(name: str) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    config, folder = adapter_config(name), adapter_at_hand(name)
    assert config is not None  # the name is a folder's, or "default"
    weights = {} if folder is None else _weights(folder, config)
    values = {
        "kind": "adapter",
        "adapter": name,
        "base_model": config.base_model,
        "base_revision": config.base_revision,
        "base_fingerprint": config.base_fingerprint,
        "ratios": list(config.ratios),
        "projections": list(config.projections),
        "training": config.training,
        **_settings(config),
        **weights,
    }
    revision = f", revision {config.base_revision}" if config.base_revision else ""
    lines = [
        ("kind", "adapter"),
        ("base", f"{config.base_model or 'unnamed'}{revision}"),
        ("base fingerprint", short_fingerprint(config.base_fingerprint or "not recorded")),
        ("ratios", ", ".join(map(str, config.ratios))),
        ("projections", ", ".join(config.projections)),
    ]
    if weights:
        lines += [
            ("parameters", f"{weights['parameters']:,} ({', '.join(weights['dtypes'])})"),
            ("files", bytes_text(weights["file_bytes"])),
            ("fingerprint", short_fingerprint(weights["adapter_fingerprint"])),
        ]
    else:
        lines += [("parameters", "none on disk: beacons begin as copies of the base model's projections")]
    lines += _setting_lines(config)
    training = config.training or {}
    lines += [(f"training {name}", _short(value)) for name, value in training.items()]
    return values, lines


def _short(value: object) -> str:
    """A value on one line; several runs by their number."""
    return str(len(value)) if isinstance(value, list) else str(value)


def _weights(folder: Path, config: "BeaconConfig") -> dict[str, Any]:
    from activation_beacon.fingerprint import fingerprint
    from activation_beacon.persistence import load_adapter_tensors

    tensors = load_adapter_tensors(folder)
    return {
        "adapter_fingerprint": fingerprint(tensors.items(), config.fingerprint_settings),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}),
        "file_bytes": sum(file.stat().st_size for file in folder.glob("beacon*.safetensors")),
    }


# --- both ------------------------------------------------------------------------------------------------------------


def _settings(config: "BeaconConfig") -> dict[str, Any]:
    return {
        "chunk_size": config.chunk_size,
        "num_sinks": config.num_sinks,
        "local_tokens": config.local_tokens,
        "anchored": config.anchored,
        "placement": config.placement,
        "exact_ids": config.exact_ids,
        **trained_fields(config),
    }


def _setting_lines(config: "BeaconConfig") -> list[tuple[str, str]]:
    local = f", at least {config.local_tokens} raw tokens in the tail" if config.local_tokens else ""
    exact = f" with {len(config.exact):,} exact ids" if config.exact_ids else ""
    anchored = f", anchored beacons{exact}" if config.anchored else ""
    beacons = "" if config.placement == "interleave" else f", beacons placed by {config.placement!r}"
    return [
        ("chunks", f"{config.chunk_size:,} tokens, {config.num_sinks} sinks{local}{anchored}{beacons}"),
        ("trained", "yes" if config.is_trained else "no (untrained)"),
    ]
