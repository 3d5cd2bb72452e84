import pytest

from activation_beacon import BeaconConfig
from activation_beacon.training.card import training_card
from activation_beacon.training.settings import Stage, TrainingSettings

CONFIG = {"chunk_size": 64, "ratios": (2, 4), "base_model": "default"}


@pytest.mark.parametrize(
    ("steps", "minutes", "text"),
    [
        (1, 1.0, "1 of 1 update, 512 tokens, 1 minute on a laptop, seed 0; ended because all steps are made."),
        (8, 0.4, "8 of 8 updates, 512 tokens, 0.4 minutes on a laptop, seed 0; ended because all steps are made."),
        (6, 12.0, "6 of 6 updates, 512 tokens, 12 minutes on a laptop, seed 0; ended because all steps are made."),
    ],
)
def test_a_card_counts_in_words_that_agree(steps, minutes, text):
    training = {
        "steps": steps, "planned_steps": steps, "tokens": 512, "minutes": minutes, "hardware": "a laptop",
        "ended": "all steps are made",
    }  # fmt: skip
    settings = TrainingSettings(output="run", documents=("texts",))
    assert text in training_card(BeaconConfig(**CONFIG, training=training), settings, [])


def test_a_card_shows_dev_texts_before_and_after_training():
    lines = [
        {"step": 0, "stage": 0, "tokens": 0, "dev": {"2": 4.0, "4": 4.5}},
        {"step": 1, "stage": 0, "tokens": 512, "loss": 3.9},
        {"step": 2, "stage": 0, "tokens": 1024, "loss": 3.8, "dev": {"2": 3.0, "4": 3.25}},
    ]
    config = BeaconConfig(**CONFIG, training={"steps": 2})
    card = training_card(config, TrainingSettings(output="run", documents=("texts",)), lines)
    assert "| after step | x2 | x4 |\n|--:|--:|--:|\n| 0 | 4.000 | 4.500 |\n| 2 | 3.000 | 3.250 |\n" in card


@pytest.mark.parametrize(
    ("made", "updates"),
    [(None, ["3", "1,000", "5"]), (1008, ["3", "1,000", "5"]), (13, ["3", "10 of 1,000", "0 of 5"])],
)
def test_a_card_says_of_each_stage_how_many_of_its_updates_were_made(made, updates):
    stages = tuple(Stage(steps=steps) for steps in (3, 1000, 5))
    config = BeaconConfig(**CONFIG, training={} if made is None else {"steps": made})
    card = training_card(config, TrainingSettings(output="run", documents=("texts",), stages=stages), [])
    rows = [
        line.split(" | ")[1] for line in card.splitlines() if line.endswith("| documents 1 | cross_entropy 1 | 0.001 |")
    ]
    assert rows == updates
