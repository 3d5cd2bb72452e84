"""The header of a compressed context's file: names and numbers, each checked before anything is made of them.

A right hash says that a file is as it was written, not that a faultless program wrote it. Knows nothing of tensors.
"""

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from activation_beacon.config import BeaconConfig
from activation_beacon.errors import FileFormatError
from activation_beacon.layouts import ClosedChunk
from activation_beacon.plan import Row
from activation_beacon.ratios import RatioPolicy, as_policy

BITS = (8, 4)  # that entries can be held in
MOST_STATES = 100  # of a kind, in a layer
MOST_LAYERS = 10_000  # a number that would fill the memory before any tensor is looked at is no number of layers
KINDS: dict[type, str] = {dict: "an object", list: "a list", str: "a string"}


@dataclass(frozen=True)
class ContextHeader:
    """What a file says of its contexts; the attributes are those of a `BeaconCache`."""

    config: BeaconConfig
    rows: tuple[Row, ...]
    policies: tuple[RatioPolicy, ...]
    context_lengths: tuple[int, ...]
    num_layers: int
    num_states: dict[int, int]
    windows: dict[int, int]
    quantized_bits: int | None
    base_fingerprint: str
    adapter_fingerprint: str

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "ContextHeader":
        """Read a header's JSON.

        Raises:
            FileFormatError, ConfigError, RatioError: naming the value that is none.
        """
        config = BeaconConfig.from_dict(_field(values, "config", dict))
        rows = tuple(_row(row, config) for row in _field(values, "rows", list))
        if not rows:
            raise FileFormatError("rows names no text")
        policies: Sequence[Any] = [_field(values, "policy", dict)] * len(rows)
        if "policies" in values:
            policies = _field(values, "policies", list)
        lengths = _field(values, "context_lengths", list) if "context_lengths" in values else [0] * len(rows)
        if {len(policies), len(lengths)} != {len(rows)}:
            raise FileFormatError("there are not as many policies, or lengths of contexts, as rows")
        return cls(
            config=config,
            rows=rows,
            policies=tuple(_policy(policy, config) for policy in policies),
            context_lengths=tuple(_int("a length of a context", length) for length in lengths),
            num_layers=_int("num_layers", values.get("num_layers"), 1, MOST_LAYERS),
            num_states=_of_layers(values, "num_states", 0, MOST_STATES),
            windows=_of_layers(values, "windows", 1, None),
            quantized_bits=_bits(values.get("quantized_bits")),
            base_fingerprint=_field(values, "base_fingerprint", str),
            adapter_fingerprint=_field(values, "adapter_fingerprint", str),
        )


def _field(values: Mapping[str, Any], name: str, kind: type) -> Any:
    if name not in values:
        raise FileFormatError(f"{name} is missing")
    if type(values[name]) is not kind:
        raise FileFormatError(f"{name} must be {KINDS[kind]}; got {reprlib.repr(values[name])}")
    return values[name]


def _int(what: str, value: object, least: int = 0, most: int | None = None) -> int:
    if type(value) is int and least <= value and (most is None or value <= most):
        return value
    bounds = f"of at least {least}" if most is None else f"within {least}..{most}"
    raise FileFormatError(f"{what} must be an int {bounds}; got {reprlib.repr(value)}")


def _bits(value: object) -> int | None:
    if value is None or (type(value) is int and value in BITS):
        return value
    raise FileFormatError(f"quantized_bits must be 8, 4 or null; got {reprlib.repr(value)}")


def _of_layers(values: Mapping[str, Any], name: str, least: int, most: int | None) -> dict[int, int]:
    """A number for each of some layers; none where the header has no such field."""
    numbers = {}
    for pair in _field(values, name, list) if name in values else []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise FileFormatError(f"{name} must be of layers and their numbers; got {reprlib.repr(pair)}")
        numbers[_int(f"a layer of {name}", pair[0], 0, MOST_LAYERS)] = _int(name, pair[1], least, most)
    return numbers


def _policy(values: object, config: BeaconConfig) -> RatioPolicy:
    if not isinstance(values, dict) or not values.keys() <= {"ratio", "budget", "spans"}:
        raise FileFormatError(f"a policy must be of ratio, budget and spans; got {reprlib.repr(values)}")
    return as_policy(config, **values)


def _row(values: object, config: BeaconConfig) -> Row:
    if not isinstance(values, dict):
        raise FileFormatError(f"a row must be of named numbers; got {reprlib.repr(values)}")
    row = Row(
        chunk_size=_int("chunk_size of a row", values.get("chunk_size"), config.chunk_size, config.chunk_size),
        tokens_seen=_int("tokens_seen", values.get("tokens_seen")),
        num_sinks=_int("num_sinks", values.get("num_sinks"), 0, config.num_sinks),
        chunks=tuple(_chunk(chunk, config) for chunk in _field(values, "chunks", list)),
    )
    if unknown := sorted(values.keys() - vars(row).keys()):
        raise FileFormatError(f"a row has a number {reprlib.repr(unknown[0])} that is not known")
    if row.tail_length < 0:
        raise FileFormatError(f"{len(row.chunks)} chunks and {row.tokens_seen} tokens seen contradict each other")
    return row


def _chunk(values: object, config: BeaconConfig) -> ClosedChunk:
    if not isinstance(values, list) or len(values) != len(ClosedChunk._fields):
        raise FileFormatError(f"a chunk must be its ratio, beacons and raw entries; got {reprlib.repr(values)}")
    ratio, num_beacons, num_raw = values
    if type(ratio) is not int or ratio not in config.ratios:
        known = ", ".join(map(str, config.ratios))
        raise FileFormatError(f"a chunk's ratio must be one of {known}; got {reprlib.repr(ratio)}")
    return ClosedChunk(
        ratio,
        _int("a chunk's number of beacons", num_beacons, 0, config.num_beacons(ratio)),
        _int("a chunk's number of raw entries", num_raw, 0, config.chunk_size),
    )
