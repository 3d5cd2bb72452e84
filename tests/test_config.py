"""Settings are checked once, in plain Python, and survive a trip through JSON."""

import dataclasses
import json

import pytest

from activation_beacon.config import FORMAT_VERSION, BeaconConfig
from activation_beacon.errors import BeaconError, ConfigError

EXACT_RULE = (
    "exact_ids needs beacons that begin as a token and stand at the chunk's end. Add anchored: true and placement: append, "
    "or leave exact_ids out."
)
EXACT = {"anchored": True, "placement": "append"}
RATIO_RULE = "A compression ratio must be an int of at least 2 (raw tokens per beacon); got {}."
PROJECTION_RULE = "projections must be some of q, k, v, o, each once; got {}."


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"chunk_size": 1024, "ratios": (2, 4, 8, 16, 32), "projections": ("q", "k", "v")}),
        ({"chunk_size": 2, "ratios": 2}, {"ratios": (2,)}),
        ({"chunk_size": 24, "ratios": [12, 3, 3, 24]}, {"ratios": (3, 12, 24)}),
        ({"projections": ("v", "o", "q")}, {"projections": ("q", "v", "o")}),
        ({"projections": ["k"]}, {"projections": ("k",)}),
        ({"chunk_size": 8, "ratios": (2,), "num_sinks": 8}, {"num_sinks": 8}),
        ({"local_tokens": 5000}, {"local_tokens": 5000}),
        ({"placement": "append"}, {"placement": "append"}),
        ({"anchored": True}, {"anchored": True}),
        ({**EXACT, "exact_ids": [7, 3, 7]}, {"exact_ids": (3, 7), "exact": {3, 7}}),
        ({**EXACT, "exact_ids": {9, 4}}, {"exact_ids": (4, 9)}),
        ({**EXACT, "exact_ids": "digits"}, {"exact_ids": "digits", "exact": frozenset()}),
    ],
)
def test_good_settings_are_kept_in_order(settings, expected):
    config = BeaconConfig(**settings)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be an int of at least 2; got 0."),
        ({"chunk_size": 1}, "chunk_size must be an int of at least 2; got 1."),
        ({"chunk_size": 64.0}, "chunk_size must be an int of at least 2; got 64.0."),
        ({"chunk_size": True}, "chunk_size must be an int of at least 2; got True."),
        ({"chunk_size": "64"}, "chunk_size must be an int of at least 2; got '64'."),
        ({"num_sinks": -1}, "num_sinks must be an int of at least 0; got -1."),
        ({"num_sinks": None}, "num_sinks must be an int of at least 0; got None."),
        ({"local_tokens": -3}, "local_tokens must be an int of at least 0; got -3."),
        ({"local_tokens": 1.5}, "local_tokens must be an int of at least 0; got 1.5."),
        (
            {"chunk_size": 8, "ratios": 2, "num_sinks": 9},
            "num_sinks (9) must not exceed chunk_size (8). Use fewer sinks.",
        ),
        ({"anchored": 1}, "anchored must be true or false; got 1."),
        (
            {"anchored": True, "projections": ("o",)},
            "anchored beacons need a copy of q, k or v; projections name o alone. Name one of them, or leave anchored out.",
        ),
        ({**EXACT, "exact_ids": "words"}, "exact_ids must be token ids, or \"digits\"; got 'words'."),
        ({**EXACT, "exact_ids": (1, -1)}, 'exact_ids must be token ids, or "digits"; got (1, -1).'),
        ({**EXACT, "exact_ids": b"ab"}, "exact_ids must be token ids, or \"digits\"; got b'ab'."),
        ({**EXACT, "exact_ids": 5}, 'exact_ids must be token ids, or "digits"; got 5.'),
        ({**EXACT, "exact_ids": (5,), "anchored": False}, EXACT_RULE),
        ({**EXACT, "exact_ids": (5,), "placement": "interleave"}, EXACT_RULE),
        ({"placement": "middle"}, "placement must be one of interleave, append; got 'middle'."),
        ({"placement": None}, "placement must be one of interleave, append; got None."),
        ({"ratios": ()}, "ratios must name at least one compression ratio, such as (2, 4, 8, 16, 32); got none."),
        ({"ratios": 0}, RATIO_RULE.format("0")),
        ({"ratios": 1}, RATIO_RULE.format("1")),
        ({"ratios": (2, -4)}, RATIO_RULE.format("-4")),
        ({"ratios": True}, RATIO_RULE.format("True")),
        ({"ratios": 2.5}, RATIO_RULE.format("2.5")),
        ({"ratios": (2, 4.0)}, RATIO_RULE.format("4.0")),
        ({"ratios": None}, RATIO_RULE.format("None")),
        ({"ratios": "x"}, RATIO_RULE.format("'x'")),
        (
            {"chunk_size": 64, "ratios": 128},
            "ratio (128) must not exceed chunk_size (64). Use smaller ratios or a larger chunk.",
        ),
        (
            {"chunk_size": 1024, "ratios": 7},
            "chunk_size (1024) must be divisible by every ratio; 7 does not divide it. Use 1022 or 1029.",
        ),
        (
            {"chunk_size": 1000},
            "chunk_size (1000) must be divisible by every ratio; 16 does not divide it. Use 992 or 1024.",
        ),
        (
            {"chunk_size": 10, "ratios": (4, 6)},
            "chunk_size (10) must be divisible by every ratio; 4 does not divide it. Use 12.",
        ),
        ({"projections": ()}, PROJECTION_RULE.format("()")),
        ({"projections": ("q", "q")}, PROJECTION_RULE.format("('q', 'q')")),
        ({"projections": ("q", "x")}, PROJECTION_RULE.format("('q', 'x')")),
        ({"projections": 3}, PROJECTION_RULE.format("(3,)")),
        ({"base_model": 5}, "base_model must be a string or None; got 5."),
        ({"base_fingerprint": b"ab"}, "base_fingerprint must be a string or None; got b'ab'."),
        ({"training": "long"}, "training must be a dictionary or None; got 'long'."),
    ],
)
def test_bad_settings_are_refused_with_the_way_out(settings, message):
    with pytest.raises(ConfigError) as caught:
        BeaconConfig(**settings)
    assert str(caught.value) == message
    assert isinstance(caught.value, BeaconError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("chunk_size", "ratios"), [(1000, (2, 4, 8, 16, 32)), (10, (4, 6)), (1024, (7,)), (33, (2, 3)), (100, (8, 3, 5))]
)
def test_every_suggested_chunk_size_works(chunk_size, ratios):
    with pytest.raises(ConfigError) as caught:
        BeaconConfig(chunk_size=chunk_size, ratios=ratios)
    suggested = str(caught.value).rpartition("Use ")[2].rstrip(".").split(" or ")
    assert suggested
    for size in suggested:
        assert BeaconConfig(chunk_size=int(size), ratios=ratios).chunk_size == int(size)


def test_a_config_cannot_be_changed():
    config = BeaconConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.chunk_size = 512


def test_numbers_that_follow_from_the_settings():
    config = BeaconConfig(chunk_size=64, ratios=(2, 8))
    assert [config.num_beacons(ratio) for ratio in config.ratios] == [32, 8]
    assert not config.is_trained
    assert dataclasses.replace(config, training={"tokens": 1}).is_trained


@pytest.mark.parametrize(
    "config",
    [
        BeaconConfig(),
        BeaconConfig(
            chunk_size=48,
            ratios=(3, 4),
            projections=("k", "v", "o"),
            num_sinks=2,
            local_tokens=7,
            anchored=True,
            placement="append",
            exact_ids=(4, 9),
            base_model="me/base",
            base_revision="main",
            base_fingerprint="0123",
            training={"steps": 10, "data": ["a", "b"]},
        ),
    ],
)
def test_a_config_survives_json(config):
    written = json.loads(json.dumps(config.to_dict()))
    assert written["format_version"] == FORMAT_VERSION
    assert BeaconConfig.from_dict(written) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"format_version": 2},
            "format_version must be 1; got 2. Use the release of activation-beacon that wrote it.",
        ),
        (
            {"format_version": None},
            "format_version must be 1; got None. Use the release of activation-beacon that wrote it.",
        ),
        (
            {"window": 3, "gist": 1},
            f"Unknown settings: gist, window. Known ones: {', '.join(sorted(BeaconConfig.__dataclass_fields__))}.",
        ),
        ({"chunk_size": "many"}, "chunk_size must be an int of at least 2; got 'many'."),
    ],
)
def test_a_foreign_dictionary_is_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        BeaconConfig.from_dict(BeaconConfig().to_dict() | changes)
    assert str(caught.value) == message


def test_reading_a_dictionary_leaves_it_as_it_was():
    values = BeaconConfig().to_dict()
    before = dict(values)
    BeaconConfig.from_dict(values)
    assert values == before
