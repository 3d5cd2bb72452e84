"""The samplers of a run: token stores of its sources, and for each stage the mix that it reads."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from activation_beacon.data.data_files import data_files
from activation_beacon.processes import Processes
from activation_beacon.training.sampling import DocumentSampler, MixedSampler, Sampler
from activation_beacon.training.settings import Stage, TrainingSettings
from activation_beacon.training.token_store import BuildProgress, TokenStore, build_token_store

LEAST_CHUNKS = 2
SMALL_FILES = 1 << 21  # bytes
DEV = ("dev", "dev_answers")  # what is measured on the way: texts, and answers to questions


@dataclass(frozen=True)
class Stores:
    """Tokens of a run's documents and of its dev texts; None where there are none."""

    documents: TokenStore | None
    dev: TokenStore | None


def check_sources(settings: TrainingSettings) -> None:
    """Look whether what the settings name is there, before anything is loaded.

    Raises:
        StorageError: if a source does not exist.
        FileFormatError: if its format is not known.
    """
    for source in (*settings.documents, *settings.questions, *settings.dev, *settings.dev_questions):
        data_files(source)


def token_stores(
    settings: TrainingSettings, tokenizer: Any, folder: Path, group: Processes, tell: Callable[[str], None]
) -> Stores:
    """Tokenise what the settings name, in the first process; the others open what it made."""
    smallest = min(stage.chunk_size or settings.config.chunk_size for stage in settings.stages)
    made: list[TokenStore | None] = []
    for name, least in (("documents", LEAST_CHUNKS * smallest), ("dev", settings.length_of_dev_texts)):
        sources = getattr(settings, name)
        with group.first_before_others():
            made.append(_store(settings, name, sources, tokenizer, folder, least, tell) if sources else None)
    return Stores(*made)


def _store(
    settings: TrainingSettings,
    name: str,
    sources: tuple[str, ...],
    tokenizer: Any,
    folder: Path,
    least: int,
    tell: Callable[[str], None],
) -> TokenStore:
    said = [0]

    def progress(state: BuildProgress) -> None:
        if state.tokens >= said[0] + 10_000_000:
            said[0] = state.tokens
            share = f", {state.bytes_done / state.bytes_total:.0%}" if state.bytes_total else ""
            tell(f"Tokenising {name}: {state.documents:,} documents, {state.tokens:,} tokens{share}")

    store = build_token_store(
        sources, tokenizer, folder, min_tokens=least, workers=_workers(settings, sources), on_error=settings.on_error,
        exclude=settings.exclude, text_field=settings.text_field, progress=progress,
    )  # fmt: skip
    tell(f"{name.capitalize()}: {len(store):,} texts, {store.num_tokens:,} tokens. {store.summary}")
    return store


def _workers(settings: TrainingSettings, sources: tuple[str, ...]) -> int:
    """Processes that tokenise; none for files that are read sooner than processes start."""
    sizes = [Path(source).stat().st_size for source in sources if Path(source).is_file()]
    return 0 if len(sizes) == len(sources) and sum(sizes) < SMALL_FILES else settings.workers


def stage_sampler(settings: TrainingSettings, number: int, stores: Stores, tokenizer: Any) -> Sampler:
    """What one stage reads."""
    stage = settings.stages[number]
    seed = settings.seed + number
    parts = [
        (_sampler(kind, settings, stage, stores, tokenizer, seed), share)
        for kind, share in stage.shares.items()
        if share
    ]
    return parts[0][0] if len(parts) == 1 else MixedSampler(parts, seed=seed)


def _sampler(kind: str, settings: TrainingSettings, stage: Stage, stores: Stores, tokenizer: Any, seed: int) -> Sampler:
    sizes: dict[str, Any] = {
        "length": stage.length,
        "chunk_size": stage.chunk_size or settings.config.chunk_size,
        "seed": seed,
    }
    if kind == "documents":
        assert stores.documents is not None, "settings are checked: documents are named"
        return DocumentSampler(stores.documents, **sizes)
    if kind == "questions":
        return _questions(settings, settings.questions, tokenizer, sizes)
    from activation_beacon.training.needles import Needles, Reconstruction

    made: Any = Needles if kind == "needles" else Reconstruction
    return made(stores.documents, tokenizer, **sizes)


def _questions(settings: TrainingSettings, sources: tuple[str, ...], tokenizer: Any, sizes: dict[str, Any]) -> Sampler:
    from activation_beacon.training.questions import PackedQuestions, read_groups

    groups = read_groups(sources, on_error=settings.on_error, exclude=settings.exclude)
    return PackedQuestions(groups, tokenizer, **sizes)


def dev_samplers(settings: TrainingSettings, stores: Stores, tokenizer: Any) -> dict[str, Sampler]:
    """What is measured on the way, by its name out of `DEV`."""
    sizes: dict[str, Any] = {
        "length": settings.length_of_dev_texts,
        "chunk_size": settings.config.chunk_size,
        "seed": 0,
    }
    texts, answers = DEV
    found: dict[str, Sampler] = {}
    if stores.dev is not None:
        found[texts] = DocumentSampler(stores.dev, **sizes)
    if settings.dev_questions:
        found[answers] = _questions(settings, settings.dev_questions, tokenizer, sizes)
    return found
