"""Which files a source of texts names, and their contents as blocks and lines. Knows nothing of records."""

import glob
import hashlib
import importlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from activation_beacon.errors import FileFormatError, StorageError, UnsupportedError, reason

Source = str | Path

MARKDOWN = (".md", ".md.gz", ".md.zst")
RECORD_FORMATS = (".txt", ".txt.gz", ".txt.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
FORMATS = (*RECORD_FORMATS, *MARKDOWN)
BY_NAME_ONLY = (".json", ".json.gz", ".json.zst")  # in a folder of texts, such a file is about them
PACKINGS = (".gz", ".zst")
NAMES_SHOWN = 3
BLOCK = 1 << 18
MAX_WINDOW = 1 << 27  # zstandard refuses windows of more than 8 MiB unless told
HUB_NAME = re.compile(
    r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)"
    r"(?:(?::(?P<config>[\w.+-]+))?:(?P<split>(?:[\w.+-]|\[[\w%:-]*\])+))?"  # a split may be cut: train[10:20]
)


class BadRecord(Exception):  # noqa: N818 - counted or turned into an error by whoever reads, never seen by users
    """A record or file that cannot be used.

    Args:
        why: a few words to count it under.
        detail: what a reader needs to mend it.
        offset: bytes before the bad one.
    """

    def __init__(self, why: str, detail: str, offset: int = 0) -> None:
        super().__init__(why, detail)
        self.why, self.detail, self.offset = why, detail, offset


# --- names -------------------------------------------------------------------------------------------------------------


def list_sources(sources: Source | Sequence[Source]) -> list[Source]:
    """One source or several, as a list."""
    return [sources] if isinstance(sources, (str, Path)) else list(sources)


def data_files(source: Source, formats: tuple[str, ...] = FORMATS) -> list[Path]:
    """The files that a source names, in the order of reading; none for a hub data set.

    Args:
        source: a file, a folder, a glob or a hub data set.
        formats: of files that are read where a folder or a glob does not name them.

    Raises:
        StorageError: if there is no such file.
        FileFormatError: if the format of a file that is named is not known.
    """
    path = Path(source).expanduser()
    if path.is_file():
        file_kind(path)
        return [path]
    if path.is_dir():
        way_out = f"Name a subfolder, or a glob such as {path}/**/*.jsonl."
        return _known(path.iterdir(), f"The folder {path}", way_out, formats)
    if hub_name(source):
        return []
    if glob.has_magic(str(path)):
        way_out = "Check it, and the folder that it starts from."
        return _known(_matches(path), f"The glob {path}", way_out, formats + _named_by(path))
    raise StorageError(
        f"There is no file, folder or glob {str(source)!r}. Name one, or a hub data set as owner/name, owner/name:split or "
        "owner/name:config:split."
    )


def left_out(source: Source, formats: tuple[str, ...] = FORMATS) -> str | None:
    """One line on what lies in a folder, or meets a glob, and is not read; None where all is.

    Args:
        source: as `data_files` takes it.
        formats: the same.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        entries, known = list(path.iterdir()), formats
    elif not path.is_file() and not hub_name(source) and glob.has_magic(str(path)):
        entries, known = [entry for entry in _matches(path) if entry.is_file()], formats + _named_by(path)
    else:
        return None
    names = sorted(
        entry.name + "/" * entry.is_dir()
        for entry in entries
        if not entry.name.startswith(".") and (entry.is_dir() or not entry.name.endswith(known))
    )
    if not names:
        return None
    more = ", ..." if len(names) > NAMES_SHOWN else ""
    kinds = [kind for kind in (".txt", ".md", ".jsonl", ".parquet") if kind in known]
    return (
        f"{source}: {len(names):,} left out ({', '.join(names[:NAMES_SHOWN])}{more}). Read are {', '.join(kinds)}; "
        "name a .json file, or a subfolder, by itself."
    )


def source_entries(source: Source) -> list[dict[str, Any]]:
    """What a source is known again by: name, bytes and SHA-256 of each of its files; a hub data set by its name alone.

    Raises:
        StorageError: if there is no such file, or it cannot be read.
        FileFormatError: if the format of a file that is named is not known.
    """
    files = data_files(source)
    if not files:
        return [{"hub": str(source)}]
    return [file_entry(path, path.name) for path in files]


def file_entry(path: Path, name: str) -> dict[str, Any]:
    """What a file of any format is known again by: its name, bytes and SHA-256.

    Raises:
        StorageError: if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return {
                "file": name,
                "bytes": path.stat().st_size,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {reason(error)}.") from error


def file_kind(path: Path) -> str:
    """.txt, .md, .jsonl, .json or .parquet, whether packed or not.

    Raises:
        FileFormatError: if the format is not known.
    """
    packing = path.suffix if path.suffix in PACKINGS else ""
    kind = path.with_suffix("").suffix if packing else path.suffix
    if kind + packing not in FORMATS + BY_NAME_ONLY:
        known = ", ".join(FORMATS + BY_NAME_ONLY)
        raise FileFormatError(f"{path} has a format that is not known. Known are {known}.")
    return kind


def hub_name(source: Source) -> re.Match[str] | None:
    """The parts `name`, `config` and `split` of what can only be a hub data set, if it can be one."""
    match = HUB_NAME.fullmatch(source) if isinstance(source, str) else None
    return None if match is None or match["name"].endswith(FORMATS + BY_NAME_ONLY) else match


def _matches(pattern: Path) -> Iterator[Path]:
    return map(Path, glob.iglob(str(pattern), recursive=True))  # noqa: PTH207 - pathlib takes no absolute patterns


def _named_by(pattern: Path) -> tuple[str, ...]:
    """Formats that a glob asks for by their ending."""
    return tuple(ending for ending in BY_NAME_ONLY + MARKDOWN if str(pattern).endswith(ending))


def _known(entries: Iterable[Path], what: str, way_out: str, formats: tuple[str, ...]) -> list[Path]:
    found = sorted(path for path in entries if path.is_file() and not path.name.startswith("."))
    files = [path for path in found if path.name.endswith(formats)]
    if not files:
        others = f" ({len(found)} others, such as {found[0].name})" if found else ""
        raise StorageError(f"{what} holds no file of a known format{others}: {', '.join(formats)}. {way_out}")
    return files


# --- contents ----------------------------------------------------------------------------------------------------------


def blocks(path: Path, count: Callable[[int], None]) -> Iterator[bytes]:
    """A file's contents, unpacked.

    Args:
        count: is told the bytes that are read, as they stand on disk.

    Raises:
        BadRecord: where a packed file is damaged or cut short.
        UnsupportedError: if the package that unpacks it is not installed.
    """
    with path.open("rb") as file:
        raw = _counted(iter(lambda: file.read(BLOCK), b""), count)
        if path.suffix == ".zst":
            zstandard = needed_package("zstandard", str(path))
            decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
            raw = _unpacked(raw, decompressor.decompressobj, zstandard.ZstdError)
        elif path.suffix == ".gz":
            raw = _unpacked(raw, lambda: zlib.decompressobj(wbits=31), zlib.error)
        yield from raw


def lines(contents: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a file's contents, without their ends."""
    pieces: list[bytes] = []
    for block in contents:
        first, *rest = block.split(b"\n")
        pieces.append(first)
        for piece in rest:
            yield b"".join(pieces)
            pieces = [piece]
    if last := b"".join(pieces):
        yield last


def needed_package(name: str, source: str) -> Any:
    """Import a package that not everybody needs.

    Raises:
        UnsupportedError: if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        more = " datasets" if package == "datasets" else ""
        raise UnsupportedError(
            f'Reading {source} needs the package {package}. Run `pip install "activation-beacon[train]"{more}`.'
        ) from error


def _counted(contents: Iterable[bytes], count: Callable[[int], None]) -> Iterator[bytes]:
    for block in contents:
        count(len(block))
        yield block


def _unpacked(contents: Iterable[bytes], begin: Callable[[], Any], broken: type[Exception]) -> Iterator[bytes]:
    """Unpack one frame after another. zstandard's own reader would take a file that is cut short for a whole one."""
    stream, is_empty = None, True
    for block in contents:
        rest, is_empty = block, False
        while rest:
            stream = stream or begin()
            octets, rest = _step(stream, rest, broken)
            if octets:
                yield octets
            if stream.eof:
                stream = None
    if stream is not None or is_empty:
        raise BadRecord("file cut short", "the packed file is cut short: it ends here, in the middle of its data")


def _step(stream: Any, octets: bytes, broken: type[Exception]) -> tuple[bytes, bytes]:
    """What some packed bytes hold, and those that belong to the next frame."""
    try:
        return stream.decompress(octets), stream.unused_data if stream.eof else b""
    except broken as error:
        raise BadRecord("damaged file", f"the packed file is damaged from here on ({reason(error)})") from error
