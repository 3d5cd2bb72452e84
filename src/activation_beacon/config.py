"""The settings of an adapter: what was decided when it was trained. Knows nothing of torch."""

import dataclasses
import functools
import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal

from activation_beacon.errors import ConfigError

FORMAT_VERSION = 1
FINGERPRINT_DIGITS = 16
PROJECTIONS = ("q", "k", "v", "o")
PLACEMENTS = ("interleave", "append")

Placement = Literal["interleave", "append"]

# Settings of the default adapter's beacons, exact ids aside, and of the paper's: what new ones are made like.
DEFAULT_KIND: dict[str, Any] = {"num_sinks": 4, "local_tokens": 128, "anchored": True, "placement": "append"}
PAPER_KIND: dict[str, Any] = {"num_sinks": 0, "local_tokens": 0, "anchored": False, "placement": "interleave"}


@dataclass(frozen=True)
class BeaconConfig:
    """Settings that an adapter is trained with and that its compressed contexts depend on.

    Args:
        chunk_size: raw tokens that are compressed together (the paper's chunk, w in section 3.1).
        ratios: compression ratios that the adapter knows, in raw tokens per beacon; each divides `chunk_size`.
        projections: attention projections of which beacons have their own copy, out of q, k, v, o.
        num_sinks: first tokens of a text whose keys and values are kept raw in front, besides being compressed.
        local_tokens: raw tokens that the tail keeps at least, after a chunk has been closed (0 = the paper).
        anchored: whether beacons project the state of a token (the last of their unit) with their own, see
            `projection.BeaconProjection` (False = the paper).
        placement: "interleave" puts one beacon after each unit; "append" puts all at the chunk's end, where no raw token of
            the chunk sees them (the paper's ablation; exact beacons need it).
        exact_ids: ids of tokens, such as digits, that beacons are to hold one by one, see `exact.anchor_tokens`; "digits"
            until a tokenizer has named them. Needs anchored beacons, placed by "append" (none = the paper).
        base_model: where the base model comes from: "default", a hub id, or a path (relative to the adapter's folder).
        base_revision: revision of the base model on the hub, or the package that it was taken from.
        base_fingerprint: fingerprint of the base model's weights, filled in by `attach`.
        training: summary of the training run; None for an untrained adapter.

    Raises:
        ConfigError: if a value is out of range or a ratio does not divide the chunk.
    """

    chunk_size: int = 1024
    ratios: tuple[int, ...] = (2, 4, 8, 16, 32)
    projections: tuple[str, ...] = ("q", "k", "v")
    num_sinks: int = 0
    local_tokens: int = 0
    anchored: bool = False
    placement: Placement = "interleave"
    exact_ids: tuple[int, ...] | Literal["digits"] = ()
    base_model: str | None = None
    base_revision: str | None = None
    base_fingerprint: str | None = None
    training: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratios", _as_ratios(self.ratios))
        object.__setattr__(self, "projections", _as_projections(self.projections))
        check_int("chunk_size", self.chunk_size, least=2)
        check_int("num_sinks", self.num_sinks, least=0)
        check_int("local_tokens", self.local_tokens, least=0)
        if not isinstance(self.anchored, bool):
            raise ConfigError(f"anchored must be true or false; got {self.anchored!r}.")
        if self.anchored and self.projections == ("o",):
            raise ConfigError(
                "anchored beacons need a copy of q, k or v; projections name o alone. Name one of them, or leave anchored out."
            )
        if self.placement not in PLACEMENTS:
            raise ConfigError(f"placement must be one of {', '.join(PLACEMENTS)}; got {self.placement!r}.")
        object.__setattr__(self, "exact_ids", _as_exact_ids(self.exact_ids))
        if self.exact_ids and not (self.anchored and self.placement == "append"):
            raise ConfigError(
                "exact_ids needs beacons that begin as a token and stand at the chunk's end. Add anchored: true and "
                "placement: append, or leave exact_ids out."
            )
        if self.num_sinks > self.chunk_size:
            raise ConfigError(
                f"num_sinks ({self.num_sinks}) must not exceed chunk_size ({self.chunk_size}). Use fewer sinks."
            )
        self._check_ratios_divide()
        self._check_origin()

    def _check_origin(self) -> None:
        for name in ("base_model", "base_revision", "base_fingerprint"):
            if not isinstance(value := getattr(self, name), str | None):
                raise ConfigError(f"{name} must be a string or None; got {value!r}.")
        if not isinstance(self.training, dict | None):
            raise ConfigError(f"training must be a dictionary or None; got {self.training!r}.")

    def _check_ratios_divide(self) -> None:
        for ratio in self.ratios:
            if ratio > self.chunk_size:
                raise ConfigError(
                    f"ratio ({ratio}) must not exceed chunk_size ({self.chunk_size}). Use smaller ratios or a larger chunk."
                )
            if self.chunk_size % ratio:
                multiple = math.lcm(*self.ratios)
                below = self.chunk_size // multiple * multiple
                ways = f"{below} or {below + multiple}" if below else f"{multiple}"
                raise ConfigError(
                    f"chunk_size ({self.chunk_size}) must be divisible by every ratio; {ratio} does not divide it. "
                    f"Use {ways}."
                )

    @property
    def is_trained(self) -> bool:
        """Whether a training run is on record. Untrained beacons are worse than no context at all, unless they are anchored."""
        return self.training is not None

    @property
    def fingerprint_settings(self) -> str:
        """The settings that beacons depend on, as they enter the adapter's fingerprint; a 0 stands where `local_tokens` stood.

        Local tokens say when a chunk is closed, not what comes of it: each context has its own.
        """
        anchored = " anchored" if self.anchored else ""
        exact = f" exact {self.exact_ids}" if self.exact_ids else ""
        return f"{self.chunk_size} {self.projections} {self.num_sinks} 0 {self.placement}{anchored}{exact}"

    @property
    def untouched_length(self) -> int:
        """Tokens up to which no chunk is closed: the longest tail."""
        return self.chunk_size + self.local_tokens

    @functools.cached_property
    def exact(self) -> frozenset[int]:
        """The `exact_ids`, to look tokens up in."""
        return frozenset(() if self.exact_ids == "digits" else self.exact_ids)

    def num_beacons(self, ratio: int) -> int:
        """Beacons that one chunk leaves behind at `ratio`."""
        return self.chunk_size // ratio

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `beacon_config.json`, with the format version in front."""
        return {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BeaconConfig":
        """Read back what `to_dict` wrote.

        Raises:
            ConfigError: if the format version or a field is not known.
        """
        values = dict(values)
        version = values.pop("format_version", None)
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"format_version must be {FORMAT_VERSION}; got {version!r}. Use the release of activation-beacon that wrote it."
            )
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"Unknown settings: {', '.join(unknown)}. Known ones: {', '.join(sorted(known))}.")
        return cls(**values)


def check_int(name: str, value: object, *, least: int) -> None:
    """Refuse a setting that is no int, or too small a one.

    Raises:
        ConfigError: with its name and value.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} must be an int of at least {least}; got {value!r}.")


def _as_ratios(ratios: int | Sequence[int]) -> tuple[int, ...]:
    ratios = tuple(ratios) if hasattr(ratios, "__iter__") else (ratios,)
    if not ratios:
        raise ConfigError("ratios must name at least one compression ratio, such as (2, 4, 8, 16, 32); got none.")
    for ratio in ratios:
        if not isinstance(ratio, int) or isinstance(ratio, bool) or ratio < 2:
            raise ConfigError(
                f"A compression ratio must be an int of at least 2 (raw tokens per beacon); got {ratio!r}."
            )
    return tuple(sorted(set(ratios)))


def _as_exact_ids(ids: object) -> tuple[int, ...] | Literal["digits"]:
    if isinstance(ids, str) and ids == "digits":
        return "digits"
    listed = tuple(ids) if isinstance(ids, Sequence | Set) and not isinstance(ids, str | bytes) else None
    if listed is None or not all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in listed):
        raise ConfigError(f'exact_ids must be token ids, or "digits"; got {ids!r}.')
    return tuple(sorted(set(listed)))


def _as_projections(projections: Sequence[str]) -> tuple[str, ...]:
    named = tuple(projections) if hasattr(projections, "__iter__") else (projections,)
    chosen = tuple(name for name in PROJECTIONS if name in named)
    if not chosen or len(chosen) != len(named):
        raise ConfigError(f"projections must be some of {', '.join(PROJECTIONS)}, each once; got {named!r}.")
    return chosen


def is_same_fingerprint(one: str, other: str) -> bool:
    """Whether two fingerprints have a name in common: the weights are the same but for rounding."""
    return not set(one.split("-")).isdisjoint(other.split("-"))


def short_fingerprint(whole: str) -> str:
    """What is shown of a fingerprint."""
    return whole[:FINGERPRINT_DIGITS]
