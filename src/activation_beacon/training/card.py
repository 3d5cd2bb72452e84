"""The model card of a trained adapter: what it was trained on, how far, at what cost, and how it stands."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from activation_beacon.config import BeaconConfig
from activation_beacon.persistence import card_front
from activation_beacon.training.settings import TrainingSettings


def training_card(config: BeaconConfig, settings: TrainingSettings, metrics: Sequence[dict[str, Any]]) -> str:
    """The card of an adapter, from its settings and the metrics of its run."""
    summary = config.training or {}
    return "\n".join(
        [
            card_front(config),
            "## Training",
            "",
            _account(summary, settings),
            "",
            *_stages(settings, summary.get("steps", settings.num_steps)),
            "",
            "![curves](curves.png)",
            "",
            *_dev_table("dev", "after the first chunk, on texts that nobody trained on", metrics, config.ratios),
            *_dev_table("dev_answers", "of answers, to questions that nobody trained on", metrics, config.ratios),
            "The recipe, to run it again: `beacon train recipe.json --output my-run`.",
            "",
            "```json",
            json.dumps(settings.to_dict(), indent=2),
            "```",
            "",
        ]
    )


def _account(summary: Mapping[str, Any], settings: TrainingSettings) -> str:
    planned, minutes = summary.get("planned_steps", 0), summary.get("minutes", 0)
    return (
        f"{summary.get('steps', 0):,} of {planned:,} {'update' if planned == 1 else 'updates'}, "
        f"{summary.get('tokens', 0):,} tokens, {minutes:g} {'minute' if minutes == 1 else 'minutes'} on "
        f"{summary.get('hardware', 'unknown hardware')}, seed {settings.seed}; ended because "
        f"{summary.get('ended', 'of reasons unknown')}. Only beacon weights were trained."
    )


def _stages(settings: TrainingSettings, num_made: int) -> list[str]:
    rows = [
        "| stage | updates | texts | tokens of a text | chunk | read | loss | learning rate |",
        "|---|--:|--:|--:|--:|---|---|--:|",
    ]
    for number, stage in enumerate(settings.stages, 1):
        read = ", ".join(f"{name} {share:g}" for name, share in stage.shares.items() if share)
        parts = ("cross_entropy", "distillation", "context_weight")
        loss = ", ".join(f"{name} {getattr(stage, name):g}" for name in parts if getattr(stage, name))
        chunk = settings.chunk_size_of(stage)
        made = min(num_made, stage.steps)
        num_made -= made
        updates = f"{stage.steps:,}" if made == stage.steps else f"{made:,} of {stage.steps:,}"
        rows.append(
            f"| {number} | {updates} | {stage.batch_size} | {stage.length:,} | {chunk:,} | {read} | {loss} | "
            f"{stage.learning_rate:g} |"
        )
    return rows


def _dev_table(name: str, what: str, metrics: Sequence[dict[str, Any]], ratios: Sequence[int]) -> list[str]:
    dev = [line for line in metrics if line.get(name)]
    if not dev:
        return []
    rows = [
        f"Nats per token {what}:",
        "",
        "| after step | " + " | ".join(f"x{ratio}" for ratio in ratios) + " |",
        "|--:|" + "--:|" * len(ratios),
    ]
    for line in dev:
        rows.append(f"| {line['step']:,} | " + " | ".join(f"{line[name][str(ratio)]:.3f}" for ratio in ratios) + " |")
    return [*rows, ""]
