"""Files that are whole or not there: written aside and moved, read only after their hash is right. No pickle."""

import contextlib
import glob
import hashlib
import json
import os
import platform
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from activation_beacon.errors import BeaconError, FileFormatError, StorageError, reason

CONTEXT_FORMAT = "activation-beacon context"
CONTEXT_VERSION = 1
LONGEST_NAME = 200  # bytes of a name that names beside it may begin with; most file systems allow 255
MOST_READINGS = 5  # of a file that is replaced each time


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary file that takes the place of `path` when the block ends well, and vanishes when it does not.

    A link stays one: what it leads to is replaced. A file that is there keeps its permissions, a new one gets the umask's.

    Raises:
        StorageError: if it cannot be written: folder missing, no permission, disk full; or if it is no regular file.
    """
    place = Path(os.path.realpath(path))
    temporary = _aside(place)
    with _writing(Path(path)):
        _check_is_regular(Path(path))
        try:
            mode = _create(temporary, like=place)
            yield temporary
            flush(temporary)
            temporary.chmod(mode)  # whoever filled it may have changed it
            temporary.replace(place)
        finally:
            temporary.unlink(missing_ok=True)


def _check_is_regular(path: Path) -> None:
    """Refuse a device or a pipe, which a file would replace; of folders the system says so itself."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise StorageError(
            f"{path} is a device, a pipe or the like, which a file cannot take the place of. Name a file."
        )


def _create(path: Path, *, like: Path) -> int:
    """Make an empty file that nobody can read who may not read the other; returns the permissions it is to have."""
    kept = stat.S_IMODE(like.stat().st_mode) & 0o777 if like.is_file() else None
    writable = 0o666 if kept is None else kept | stat.S_IRUSR | stat.S_IWUSR
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, writable)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode) if kept is None else kept  # new ones are as the umask has it
    finally:
        os.close(handle)


def flush(path: Path) -> None:
    """Wait until a file is on its disk, which may turn out to be full."""
    with path.open("rb") as written:
        os.fsync(written.fileno())


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Turns what goes wrong while writing into one error that names the target."""
    try:
        yield
    except BeaconError:
        raise
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{target} cannot be written: {reason(error)}. Nothing was changed; free space or choose another place."
        ) from error


def _aside(path: Path, owner: str = "") -> Path:
    return path.with_name(f"{_aside_start(path)}{owner}{secrets.token_hex(4)}.part")


def _aside_start(path: Path) -> str:
    """What names beside a path begin with: its own, or a digest of one that is as long as a name may be."""
    name = os.fsencode(path.name)
    return f".{path.name if len(name) <= LONGEST_NAME else hashlib.sha256(name).hexdigest()[:16]}."


def make_folder(folder: Path, way_out: str = "Choose another folder.") -> None:
    """Make a folder, and those that it lies in.

    Raises:
        StorageError: if it cannot be made, with the reason and the way out.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder} cannot be made: {reason(error)}. {way_out}") from error


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole.

    Raises:
        StorageError: if it cannot be written.
    """
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def build_folder(source: str | Path, target: str | Path, write: Callable[[Path], None]) -> None:
    """Build a folder aside with `write` and move it into place when it is complete.

    What a process that was killed has left of the same folder is removed first.

    Args:
        source: named in errors.
        target: the folder; must not exist or be empty.
        write: fills the folder that it is given.

    Raises:
        StorageError: if the target is in use or cannot be written.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StorageError(
            f"{target} exists already and is not empty. Choose another folder for what comes of {source}."
        )
    aside = _aside(target, f"{_host()}-{os.getpid()}.")
    with _writing(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_left(target)
            aside.mkdir()
            write(aside)
            if target.exists():
                target.rmdir()
            aside.replace(target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _remove_left(target: Path) -> None:
    """Remove folders aside whose processes, by their names one of this machine, are no more."""
    start = f"{_aside_start(target)}{_host()}-"
    for path in target.parent.glob(f"{glob.escape(start)}*.part"):
        number = path.name.removeprefix(start).partition(".")[0]
        if number.isdecimal() and not _is_running(int(number)):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(process: int) -> bool:
    if os.name != "posix":
        return True  # nobody can be asked without harm
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it is another user's
        return True
    return True


def write_context_file(path: str | Path, header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> int:
    """Write a header and tensors as one safetensors file, with a SHA-256 over both in its metadata.

    Returns:
        Bytes written.

    Raises:
        StorageError: if it cannot be written; an older file at `path` is left as it was.
    """
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    text = json.dumps({"version": CONTEXT_VERSION, **header}, sort_keys=True)
    metadata = {"format": CONTEXT_FORMAT, "header": text, "sha256": _digest(text, tensors)}
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
        return temporary.stat().st_size


def read_context_file(path: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read what `write_context_file` wrote; the file is opened by mmap. One that is replaced meanwhile is read again.

    Raises:
        StorageError: if the file cannot be opened.
        FileFormatError: if it is damaged, cut short, or another kind of file.
    """
    if not Path(path).is_file():
        what = "is a folder" if Path(path).is_dir() else "does not exist"
        raise StorageError(f"{path} {what}. Name a file that `beacon compress` or context.save wrote.")
    for _ in range(MOST_READINGS - 1):
        before = _identity(path)
        try:
            return _read_context_file(path)
        except BeaconError:
            if _identity(path) == before:
                raise
    return _read_context_file(path)


def _identity(path: str | Path) -> tuple[int, ...]:
    """Another value where another file has taken the place: safetensors opens a file by its name, twice."""
    try:
        found = Path(path).stat()
    except OSError:
        return ()
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _read_context_file(path: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != CONTEXT_FORMAT:
                raise FileFormatError(
                    f"{path} is a safetensors file but not a compressed context. Name a *.beacon file."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise FileFormatError(
            f"{path} is damaged, cut short, or not a compressed context ({reason(error)}). Compress the text again."
        ) from error
    except (OSError, RuntimeError) as error:  # the latter from torch: no memory to map it, too many open files
        raise StorageError(f"{path} cannot be read: {reason(error)}.") from error
    header = metadata.get("header", "")
    if _digest(header, tensors) != metadata.get("sha256"):
        raise FileFormatError(f"{path} is damaged: its contents do not match their SHA-256. Compress the text again.")
    values = _parsed(header, path)
    if values.get("version") != CONTEXT_VERSION:
        raise FileFormatError(
            f"{path} has format version {values.get('version')!r}; this release reads {CONTEXT_VERSION}. Use the one that wrote it."
        )
    return values, tensors


def _parsed(header: str, path: str | Path) -> dict[str, Any]:
    try:
        values = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} is damaged: its header is no JSON. Compress the text again.") from error
    if not isinstance(values, dict):
        raise FileFormatError(f"{path} is damaged: its header is no JSON object. Compress the text again.")
    return values


def _digest(header: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            octets: Any = tensor.reshape(-1).view(torch.uint8).numpy()
            digest.update(octets)
    return digest.hexdigest()
