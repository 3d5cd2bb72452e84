"""Where texts come from: files, folders and hub data sets, read as a stream, record by record.

Knows nothing of tokens. A bad record is skipped or stops the reading, as the caller chose, and is named by file and line
either way; a source that does not exist or has an unknown format always stops it.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from activation_beacon.data.chat_shapes import flat_chat
from activation_beacon.data.data_files import (
    FORMATS,
    RECORD_FORMATS,
    BadRecord,
    Source,
    blocks,
    data_files,
    file_kind,
    hub_name,
    lines,
    list_sources,
    needed_package,
)
from activation_beacon.data.fields import decoded, object_of, parsed, text_of
from activation_beacon.data.question_shapes import flat_questions, is_unanswerable
from activation_beacon.errors import ConfigError, InputError, StorageError, reason

OnError = Literal["skip", "stop"]

ROWS = 256
PLACES_SHOWN = 3
LINE_END = b"\n"


@dataclass
class ReadReport:
    """What was read and what was left out, with the first places of each reason.

    Attributes:
        records: records handed on.
        bytes_read: of the files, as they stand on disk.
        skipped: number of records left out, by reason.
        places: the first few places of each reason.
    """

    records: int = 0
    bytes_read: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)

    def skip(self, why: str, place: str) -> None:
        """Count one record that is left out."""
        self.skipped[why] = self.skipped.get(why, 0) + 1
        places = self.places.setdefault(why, [])
        if len(places) < PLACES_SHOWN:
            places.append(place)

    def summary(self) -> str:
        """One line that says it all."""
        counts = f"{self.records:,} records read, {sum(self.skipped.values()):,} skipped"
        return counts + (": " + "; ".join(map(self._reason_text, self.skipped)) if self.skipped else "") + "."

    def _reason_text(self, why: str) -> str:
        count, places = self.skipped[why], self.places[why]
        return f"{count:,} {why} ({', '.join(places)}{', ...' if count > len(places) else ''})"


@dataclass(frozen=True)
class Record:
    """One record of a source.

    Attributes:
        file: path of the file, or name of the hub data set.
        line: number of its line or row, from 1.
        fields: what stands in it.
        unit: what `line` counts.
        path: of a part within what stands there, such as "questions[0]"; "" for all of it.
    """

    file: str
    line: int
    fields: dict[str, Any]
    unit: Literal["line", "row", "item"] = "line"
    path: str = ""

    @property
    def place(self) -> str:
        """File and line, as messages name them."""
        return f"{self.file}, {self.unit} {self.line}" + (f", {self.path}" if self.path else "")

    @property
    def name(self) -> str:
        """Its own id, or file and line."""
        given = self.fields.get("id")
        if isinstance(given, (str, int)):
            return str(given)
        return f"{Path(self.file).name}:{self.line}" + (f"#{self.path}" if self.path else "")


@dataclass(frozen=True)
class Question:
    """A question on a context ("" where it has none), its answer, and all accepted answers."""

    id: str
    context: str
    question: str
    answer: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Chat:
    """A conversation: a system message ("" for none), then questions with their answers."""

    id: str
    system: str
    turns: tuple[tuple[str, str], ...]


class _Intake:
    """What happens to bad records: counted, or the end."""

    def __init__(self, on_error: OnError, report: ReadReport | None) -> None:
        if on_error not in ("skip", "stop"):
            raise ConfigError(f'on_error must be "skip" or "stop"; got {on_error!r}.')
        self.on_error = on_error
        self.report = ReadReport() if report is None else report

    def count_bytes(self, number: int) -> None:
        self.report.bytes_read += number

    def refuse(self, place: str, bad: BadRecord) -> None:
        if self.on_error == "stop":
            raise InputError(
                f"{place}: {bad.detail}. Mend or remove it, or have bad records skipped (--on-error skip)."
            )
        self.report.skip(bad.why, place)


def read_records(
    source: Source, *, on_error: OnError = "skip", report: ReadReport | None = None, text_field: str = "text"
) -> Iterator[Record]:
    """Read one source, record by record.

    Args:
        source: a file (`FORMATS`), a folder of such files, a glob, or a hub data set: "owner/name", "owner/name:split" or
            "owner/name:config:split" (its only or default configuration and its train split unless named). A .txt or .md file
            is one record, and so is the object in a .json file; an array there has a record in each item.
        on_error: what to do with a bad record.
        report: counts are added to it.
        text_field: name under which the text of a .txt file is handed on.

    Raises:
        StorageError: if there is no such file, or it cannot be read.
        FileFormatError: if the file's format is not known.
        InputError: at a bad record, with `on_error` "stop".
        UnsupportedError: if a package that this source needs is not installed.
        ConfigError: if `on_error` is neither "skip" nor "stop".
    """
    intake = _Intake(on_error, report)
    for record in _records(source, intake, text_field):
        intake.report.records += 1
        yield record


def documents(
    sources: Source | Sequence[Source],
    *,
    text_field: str = "text",
    exclude: Collection[str] = (),
    on_error: OnError = "skip",
    report: ReadReport | None = None,
) -> Iterator[tuple[str, str]]:
    """Read id and text of every document; those without an "id" are named by file and line.

    Args:
        text_field: the field that holds the text.
        exclude: ids to leave out; "a" leaves out the parts "a#..." too.

    Raises:
        As `read_records`; a document that is empty or has no text is a bad record.
    """
    for record, text in _documents(sources, text_field, (), exclude, _Intake(on_error, report)):
        yield record.name, text


def documents_of_kinds(
    sources: Source | Sequence[Source],
    *,
    kind_field: str,
    text_field: str = "text",
    on_error: OnError = "skip",
    report: ReadReport | None = None,
) -> Iterator[tuple[str, str, str]]:
    """Read id, text and kind of every document, the kind from a field of that name.

    Raises:
        As `documents`; a document of no kind is a bad record.
    """
    for record, text in _documents(sources, text_field, (kind_field,), (), _Intake(on_error, report)):
        yield record.name, text, record.fields[kind_field]


def questions(
    sources: Source | Sequence[Source],
    *,
    exclude: Collection[str] = (),
    on_error: OnError = "skip",
    report: ReadReport | None = None,
) -> Iterator[Question]:
    """Read questions: fields "question", "answer" or "answers", and "context" where there is one.

    Records as SQuAD, QuALITY, NarrativeQA and MuSiQue are published are known by their fields (`question_shapes`). A
    question that its set calls unanswerable is left out and counted, whatever `on_error` says.

    Raises:
        As `read_records`; a question without text or answer is a bad record.
    """
    intake = _Intake(on_error, report)
    records = _all_records(sources, intake, "text", RECORD_FORMATS)  # among questions, Markdown is about them
    parts = (part for record in records for part in _parts(record, intake))
    for record in _wanted(parts, exclude, intake):
        if is_unanswerable(record.fields):
            intake.report.skip("unanswerable", record.place)
            continue
        try:
            question = _question_of(record)
        except BadRecord as bad:
            intake.refuse(record.place, bad)
            continue
        intake.report.records += 1
        yield question


def chats(
    sources: Source | Sequence[Source],
    *,
    exclude: Collection[str] = (),
    on_error: OnError = "skip",
    report: ReadReport | None = None,
) -> Iterator[Chat]:
    """Read conversations, in the shapes that `chat_shapes` knows.

    Raises:
        As `read_records`; a conversation in which nothing is answered, or not all is text, is a bad record.
    """
    intake = _Intake(on_error, report)
    for record in _wanted(_all_records(sources, intake, "text", RECORD_FORMATS), exclude, intake):
        try:
            system, turns = flat_chat(record.fields)
        except BadRecord as bad:
            intake.refuse(record.place, bad)
            continue
        intake.report.records += 1
        yield Chat(record.name, system, tuple(turns))


# --- documents ---------------------------------------------------------------------------------------------------------


def _documents(
    sources: Source | Sequence[Source],
    text_field: str,
    others: Sequence[str],
    exclude: Collection[str],
    intake: _Intake,
) -> Iterator[tuple[Record, str]]:
    """Records and their texts; those are left out that have none, or none in one of the other fields."""
    for record in _wanted(_all_records(sources, intake, text_field), exclude, intake):
        try:
            text = text_of(record.fields, text_field, empty="empty document")
            for name in others:
                text_of(record.fields, name, empty=f"empty {name}")
        except BadRecord as bad:
            intake.refuse(record.place, bad)
            continue
        intake.report.records += 1
        yield record, text


# --- records -----------------------------------------------------------------------------------------------------------


def _wanted(records: Iterator[Record], exclude: Collection[str], intake: _Intake) -> Iterator[Record]:
    left_out = {exclude} if isinstance(exclude, str) else set(exclude)
    for record in records:
        if record.name in left_out or record.name.partition("#")[0] in left_out:
            intake.report.skip("excluded", record.name)
        else:
            yield record


def _all_records(
    sources: Source | Sequence[Source], intake: _Intake, text_field: str, formats: tuple[str, ...] = FORMATS
) -> Iterator[Record]:
    for source in list_sources(sources):
        data_files(source, formats)  # what is named wrongly is told before anything is read
    for source in list_sources(sources):
        yield from _records(source, intake, text_field, formats)


def _records(source: Source, intake: _Intake, text_field: str, formats: tuple[str, ...] = FORMATS) -> Iterator[Record]:
    readers = {
        ".txt": _read_text, ".md": _read_text, ".jsonl": _read_lines, ".json": _read_json, ".parquet": _read_parquet
    }  # fmt: skip
    files = data_files(source, formats)
    if not files:
        yield from _read_hub(str(source))
    for path in files:
        try:
            yield from readers[file_kind(path)](path, intake, text_field)
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise StorageError(f"{path} cannot be read: {reason(error)}.") from error


def _read_text(path: Path, intake: _Intake, text_field: str) -> Iterator[Record]:
    for text in _read_whole(path, intake, decoded):
        yield Record(str(path), 1, {text_field: text})


def _read_json(path: Path, intake: _Intake, _text_field: str) -> Iterator[Record]:
    for value in _read_whole(path, intake, lambda octets: _object_or_list(parsed(octets, "file"))):
        if isinstance(value, dict):
            yield Record(str(path), 1, value)
            return
        for number, item in enumerate(value, start=1):
            try:
                record = Record(str(path), number, object_of(item, "item"), "item")
            except BadRecord as bad:
                intake.refuse(f"{path}, item {number}", bad)
                continue
            yield record


def _object_or_list(value: Any) -> Any:
    return value if isinstance(value, list) else object_of(value, "file")


def _read_whole(path: Path, intake: _Intake, read: Callable[[bytes], Any]) -> Iterator[Any]:
    """What a file holds as a whole; nothing if it is refused."""
    octets = b""
    try:
        octets = b"".join(blocks(path, intake.count_bytes))
        value = read(octets)
    except BadRecord as bad:
        intake.refuse(f"{path}, line {octets.count(LINE_END, 0, bad.offset) + 1}", bad)
        return
    yield value


def _read_lines(path: Path, intake: _Intake, _text_field: str) -> Iterator[Record]:
    number = 0
    try:
        for number, octets in enumerate(lines(blocks(path, intake.count_bytes)), start=1):
            if not octets.strip():
                continue
            try:
                record = Record(str(path), number, object_of(parsed(octets, "line"), "line"))
            except BadRecord as bad:
                intake.refuse(f"{path}, line {number}", bad)
                continue
            yield record
    except BadRecord as bad:
        intake.refuse(f"{path}, line {number + 1}", bad)


def _read_parquet(path: Path, intake: _Intake, _text_field: str) -> Iterator[Record]:
    parquet, arrow = needed_package("pyarrow.parquet", str(path)), needed_package("pyarrow", str(path))
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            share = path.stat().st_size / max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(batch_size=ROWS):
                intake.count_bytes(int(share * batch.num_rows))
                for fields in batch.to_pylist():
                    number += 1
                    yield Record(str(path), number, fields, "row")
    except arrow.ArrowException as error:
        detail = f"the file is damaged or cut short ({reason(error)})"
        intake.refuse(f"{path}, row {number + 1}", BadRecord("damaged file", detail))


def _read_hub(source: str) -> Iterator[Record]:
    match = hub_name(source)
    assert match is not None  # data_files saw to it
    datasets = needed_package("datasets", source)
    try:
        chosen = [match["config"]] if match["config"] else []
        rows = datasets.load_dataset(match["name"], *chosen, split=match["split"] or "train", streaming=True)
        for number, fields in enumerate(rows, start=1):
            yield Record(source, number, dict(fields), "row")
    except Exception as error:  # the hub fails in many ways
        raise StorageError(
            f"There is no file {source!r}, and as a data set of the hub it cannot be read: {reason(error)}. "
            "Check the name, the configuration and the split (owner/name:config:split), and the network."
        ) from error


# --- questions ---------------------------------------------------------------------------------------------------------


def _parts(record: Record, intake: _Intake) -> Iterator[Record]:
    """The questions that a record holds, each as a flat record."""

    def refuse(path: str, bad: BadRecord) -> None:
        intake.refuse(replace(record, path=path).place, bad)

    for path, fields in flat_questions(record.fields, refuse):
        yield replace(record, path=path, fields=fields)


def _question_of(record: Record) -> Question:
    fields = record.fields
    question = text_of(fields, "question", empty="empty question")
    answers = _answers_of(fields)
    if "answer" in fields or not answers:
        answers = [text_of(fields, "answer", empty="empty answer"), *answers]
    context = text_of(fields, "context", empty="empty context") if fields.get("context") else ""
    return Question(record.name, context, question, answers[0], tuple(dict.fromkeys(answers)))


def _answers_of(fields: dict[str, Any]) -> list[str]:
    """All accepted answers: a list of texts or of objects with a "text", or one object with a list as SQuAD has on the hub."""
    found = fields.get("answers")
    if isinstance(found, dict):
        found = found.get("text")
    given = found if isinstance(found, (list, tuple)) else []
    return [_answer_of(each) for each in given]


def _answer_of(given: Any) -> str:
    if isinstance(given, dict):
        return text_of(given, "text", empty="empty answer")
    return text_of({"answers": given}, "answers", empty="empty answer")
