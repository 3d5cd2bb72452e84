"""What a run reads: its sources, read once, and for each stage a sampler of the mix that it is given."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activation_beacon.data.data_files import FORMATS, RECORD_FORMATS, data_files, left_out
from activation_beacon.data.sources import ReadReport
from activation_beacon.errors import InputError
from activation_beacon.processes import Processes
from activation_beacon.training.sampling import LEAST_CHUNKS, DocumentSampler, MixedSampler, Sampler
from activation_beacon.training.settings import Stage, TrainingSettings
from activation_beacon.training.token_store import BuildProgress, TokenStore, build_token_store

if TYPE_CHECKING:
    from activation_beacon.data.sources import Chat
    from activation_beacon.training.questions import QuestionGroup

Tell = Callable[[str], None]

SMALL_FILES = 1 << 21  # bytes
MANY_CHATS = 10_000  # take half a minute to be counted
PLAIN = (".txt", ".md", ".jsonl")  # a text in such a file has no more tokens than the file has bytes
PURPOSE = "to train on"
DEV_PURPOSE = "of those that --dev names to measure on"
DEV = ("dev", "dev_answers")  # what is measured on the way: texts, and answers to questions


@dataclass(frozen=True)
class RunData:
    """What a run reads: tokens of its documents and dev texts, None where there are none, questions on contexts, conversations."""

    documents: TokenStore | None
    dev: TokenStore | None
    questions: "list[QuestionGroup]"
    dev_questions: "list[QuestionGroup]"
    chats: "list[Chat]" = field(default_factory=list)

    @property
    def digests(self) -> dict[str, str]:
        """Of what is trained on, by its name in the settings."""
        found = {} if self.documents is None else {"documents": self.documents.digest}
        if self.questions:
            from activation_beacon.training.questions import digest_of

            found["questions"] = digest_of(self.questions)
        if self.chats:
            from activation_beacon.training import chats

            found["chats"] = chats.digest_of(self.chats)
        return found


def check_sources(settings: TrainingSettings, tell: Tell) -> None:
    """Look whether what the settings name is there, before anything is loaded.

    Args:
        settings: of the run.
        tell: is called with what lies in a source and is not read.

    Raises:
        StorageError: if a source does not exist.
        FileFormatError: if its format is not known.
        InputError: if no dev text can be long enough.
    """
    texts, questions = (*settings.documents, *settings.dev), (*settings.questions, *settings.dev_questions)
    records = (*questions, *settings.chats)
    named = [(source, FORMATS) for source in texts] + [(source, RECORD_FORMATS) for source in records]
    for source, formats in named:
        data_files(source, formats)
    for source, formats in dict.fromkeys(named):
        if line := left_out(source, formats):
            tell(line)
    _check_dev_files(settings)


def _check_dev_files(settings: TrainingSettings) -> None:
    """Refuse dev files none of which has as many bytes as a dev text has tokens: no tokenizer has to be loaded for that.

    Raises:
        InputError: with the longest file, and the way out.
    """
    found = [data_files(source) for source in settings.dev]
    files = [path for each in found for path in each]
    if not all(found) or any(path.suffix not in PLAIN for path in files):
        return
    longest = max(files, key=lambda path: path.stat().st_size, default=None)
    if longest is not None and (size := longest.stat().st_size) < settings.length_of_dev_texts:
        raise InputError(f"No document is left {DEV_PURPOSE}: {longest} has {size:,} bytes. {_dev_way_out(settings)}")


def _dev_way_out(settings: TrainingSettings) -> str:
    length, least = settings.length_of_dev_texts, LEAST_CHUNKS * settings.config.chunk_size
    shorter = f", or measure on shorter ones: --set dev_length={least}" if least < length else ""
    return f"Name texts of at least {length:,} tokens{shorter}."


def read_sources(settings: TrainingSettings, tokenizer: Any, folder: Path, group: Processes, tell: Tell) -> RunData:
    """Read what the settings name. The first process tokenises documents; the others open what it made.

    Args:
        folder: for the tokens of documents.
        tell: is called with what was found, and with file and line of what was skipped.

    Raises:
        As `sources.read_records`, and InputError if nothing but what is to be measured on is left to train on.
    """
    smallest = min(map(settings.chunk_size_of, settings.stages))
    with group.first_before_others():
        # The shorter ones first: what is refused is refused soon.
        dev = _store(settings, "dev", tokenizer, folder, settings.length_of_dev_texts, tell)
    with group.first_before_others():
        documents = _store(settings, "documents", tokenizer, folder, LEAST_CHUNKS * smallest, tell)
    if documents is not None and dev is not None:
        documents = _documents_without(documents, dev, tell)
    questions, dev_questions = (_groups(settings, name, tell) for name in ("questions", "dev_questions"))
    if questions and dev_questions:
        questions = _questions_without(questions, dev_questions, tell)
    return RunData(documents, dev, questions, dev_questions, _chats(settings, tell))


def _documents_without(documents: TokenStore, dev: TokenStore, tell: Tell) -> TokenStore:
    """Documents but for dev texts: what is measured on must not have been trained on."""
    kept = documents.without(dev)
    _tell_shared("document", len(documents), len(kept), "--dev", tell)
    return kept


def _questions_without(groups: "list[QuestionGroup]", dev: "list[QuestionGroup]", tell: Tell) -> "list[QuestionGroup]":
    from activation_beacon.training.questions import without

    kept = without(groups, dev)
    before, after = (sum(len(group.questions) for group in each) for each in (groups, kept))
    _tell_shared("question", before, after, "--dev-questions", tell)
    return kept


def _tell_shared(what: str, before: int, after: int, option: str, tell: Tell) -> None:
    """Say how many are not trained on.

    Raises:
        InputError: if none is left.
    """
    if not after:
        raise InputError(
            f"No {what} is left {PURPOSE}: all {before:,} are of those that {option} names to measure on. Name others."
        )
    if after < before:
        tell(
            f"{what.capitalize()}s: {before - after:,} of {before:,} are not trained on: {option} names them to measure on."
        )


def _store(
    settings: TrainingSettings, name: str, tokenizer: Any, folder: Path, least: int, tell: Tell
) -> TokenStore | None:
    sources = getattr(settings, name)
    if not sources:
        return None
    said = [0]

    def progress(state: BuildProgress) -> None:
        if state.tokens >= said[0] + 10_000_000:
            said[0] = state.tokens
            share = f", {state.bytes_done / state.bytes_total:.0%}" if state.bytes_total else ""
            tell(f"Tokenising {name}: {state.documents:,} documents, {state.tokens:,} tokens{share}")

    purpose, way_out = PURPOSE, "Name other sources."
    if name == "dev":
        purpose, way_out = DEV_PURPOSE, _dev_way_out(settings)
    store = build_token_store(
        sources, tokenizer, folder, min_tokens=least, workers=_workers(settings, sources), on_error=settings.on_error,
        exclude=settings.exclude, text_field=settings.text_field, progress=progress,
        max_tokens=settings.max_tokens if name == "documents" else None, purpose=purpose, way_out=way_out,
    )  # fmt: skip
    texts = "text" if len(store) == 1 else "texts"
    tell(f"{name.capitalize()}: {len(store):,} {texts}, {store.num_tokens:,} tokens. {store.summary}")
    return store


def _workers(settings: TrainingSettings, sources: tuple[str, ...]) -> int:
    """Processes that tokenise; none for files that are read sooner than processes start."""
    sizes = [Path(source).stat().st_size for source in sources if Path(source).is_file()]
    return 0 if len(sizes) == len(sources) and sum(sizes) < SMALL_FILES else settings.workers


def _groups(settings: TrainingSettings, name: str, tell: Tell) -> "list[QuestionGroup]":
    sources = getattr(settings, name)
    if not sources:
        return []
    from activation_beacon.training.questions import read_groups

    report = ReadReport()
    groups = read_groups(sources, on_error=settings.on_error, exclude=settings.exclude, report=report)
    contexts = sum(bool(group.context) for group in groups)
    tell(f"{_title(name)}: {report.records:,} on {contexts:,} contexts. {report.summary()}")
    return groups


def _chats(settings: TrainingSettings, tell: Tell) -> "list[Chat]":
    if not settings.chats:
        return []
    from activation_beacon.data.sources import chats

    report = ReadReport()
    found = list(chats(settings.chats, on_error=settings.on_error, exclude=settings.exclude, report=report))
    answers = sum(len(chat.turns) for chat in found)
    tell(f"Conversations: {len(found):,} with {answers:,} answers. {report.summary()}")
    return found


def _title(name: str) -> str:
    return name.replace("_", " ").capitalize()


# --- samplers ----------------------------------------------------------------------------------------------------------


def stage_samplers(settings: TrainingSettings, data: RunData, tokenizer: Any, tell: Tell) -> list[Sampler]:
    """What each stage reads."""
    return [_stage_sampler(settings, number, data, tokenizer, tell) for number in range(len(settings.stages))]


def _stage_sampler(settings: TrainingSettings, number: int, data: RunData, tokenizer: Any, tell: Tell) -> Sampler:
    stage = settings.stages[number]
    sizes: dict[str, Any] = {
        "length": stage.length,
        "chunk_size": settings.chunk_size_of(stage),
        "seed": settings.seed + number,
    }
    parts = [
        (_sampler(kind, stage, data, tokenizer, sizes, tell), share) for kind, share in stage.shares.items() if share
    ]
    return parts[0][0] if len(parts) == 1 else MixedSampler(parts, seed=sizes["seed"])


def _sampler(kind: str, stage: Stage, data: RunData, tokenizer: Any, sizes: dict[str, Any], tell: Tell) -> Sampler:
    if kind == "questions":
        return _packed(data.questions, "questions", tokenizer, sizes, tell)
    if kind == "chats":
        return _whole(data.chats, tokenizer, sizes, tell)
    assert data.documents is not None, "settings are checked: documents are named"
    if kind == "documents":
        return DocumentSampler(data.documents, **sizes, local_tokens=stage.local_tokens)
    from activation_beacon.training.needles import Needles, Reconstruction

    if kind == "needles":
        return Needles(data.documents, tokenizer, **sizes, kinds=stage.needle_kinds)
    return Reconstruction(data.documents, tokenizer, **sizes)


def _packed(groups: "list[QuestionGroup]", name: str, tokenizer: Any, sizes: dict[str, Any], tell: Tell) -> Sampler:
    from activation_beacon.training.questions import PackedQuestions

    packed = PackedQuestions(groups, tokenizer, **sizes)
    if packed.left_out:
        length = sizes["length"]
        tell(f"{_title(name)}: {packed.left_out:,} are left out: with their contexts they exceed {length:,} tokens.")
    return packed


def _whole(chats: "list[Chat]", tokenizer: Any, sizes: dict[str, Any], tell: Tell) -> Sampler:
    from activation_beacon.training.chats import Chats

    if len(chats) >= MANY_CHATS:
        tell(f"Conversations: the tokens of {len(chats):,} are being counted.")
    made = Chats(chats, tokenizer, **sizes)
    if made.num_longer or made.num_shorter:
        tell(
            f"Conversations: {len(made):,} are read, {made.num_longer:,} are longer than {sizes['length']:,} tokens, "
            f"{made.num_shorter:,} are no longer than a chunk."
        )
    return made


def dev_samplers(settings: TrainingSettings, data: RunData, tokenizer: Any, tell: Tell) -> dict[str, Sampler]:
    """What is measured on the way, by its name out of `DEV`."""
    sizes: dict[str, Any] = {
        "length": settings.length_of_dev_texts,
        "chunk_size": settings.config.chunk_size,
        "seed": 0,
    }
    texts, answers = DEV
    found: dict[str, Sampler] = {}
    if data.dev is not None:
        found[texts] = DocumentSampler(data.dev, **sizes)
    if settings.dev_questions:
        found[answers] = _packed(data.dev_questions, "dev_questions", tokenizer, sizes, tell)
    return found
