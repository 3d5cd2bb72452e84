"""Options that several commands share."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from activation_beacon.errors import InputError, RatioError

MOST_SEED = 2**32 - 1  # that numpy takes
RatioOption = int | tuple[int, ...] | str


class Dtype(StrEnum):
    """Float types that a model can be loaded in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Bits(StrEnum):
    """Bits that beacons can be kept in."""

    EIGHT = "8"
    FOUR = "4"


class CpuMatmul(StrEnum):
    """What multiplies float32 matrices on a CPU."""

    AUTO = "auto"
    ONEDNN = "onednn"
    TORCH = "torch"


Model = Annotated[
    str, typer.Option("--model", help='Adapter folder or hub id; "default" is the model that comes with the package.')
]
Base = Annotated[
    str | None,
    typer.Option("--base", help="Base model folder or hub id, if it is elsewhere than the adapter says."),
]
Device = Annotated[
    str | None, typer.Option("--device", help='Such as "cpu" or "cuda:0"; by default a CUDA device if there is one.')
]
DtypeOption = Annotated[
    Dtype | None, typer.Option("--dtype", help="Float type to load the model in; by default its own.")
]
LocalTokens = Annotated[
    int | None,
    typer.Option(
        "--local-tokens",
        min=0,
        help="Last tokens of a text that stay raw at least; by default the adapter's number, 128 for the default one.",
        show_default=False,
    ),
]
CpuMatmulOption = Annotated[
    CpuMatmul,
    typer.Option("--cpu-matmul", help="What multiplies float32 matrices on a CPU with beacons; auto: the faster one."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist already.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens of an answer at most.")]
Temperature = Annotated[
    float, typer.Option("--temperature", min=0.0, help="Randomness of answers; 0 always takes the likeliest token.")
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed", min=0, max=MOST_SEED, help="Seed of the randomness, to get the same answer again.", show_default=False
    ),
]
Context = Annotated[Path, typer.Argument(metavar="FILE", help="A context that `beacon compress` wrote.")]

PEERS_PYTHON = Path(".venv-peers/bin/python")  # as `make peers` makes it
PeersPython = Annotated[
    Path,
    typer.Option(
        "--peers-python",
        metavar="FILE",
        help="Python of an environment with kvpress, for its methods (`make peers`).",
    ),
]


def examples(*lines: str) -> str:
    """The end of a command's help. The mark keeps the lines as they are."""
    return "\n".join(["Examples:" if len(lines) > 1 else "Example:", "", "\b", *(f"  {line}" for line in lines)])


def parse_ratios(text: str) -> tuple[int, ...]:
    """What `--ratios` asks for: each ratio once, smallest first.

    Raises:
        RatioError: if it is not a list of ints.
    """
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise RatioError(f"--ratios must be ints such as 2,8,32; got {text!r}.") from None


def parse_numbers(text: str, option: str) -> tuple[int, ...]:
    """What an option with a list of numbers asks for: each once, smallest first.

    Raises:
        InputError: if it is not a list of ints of at least 1.
    """
    if all(part.strip().isdecimal() and int(part) for part in text.split(",")):
        return tuple(sorted({int(part) for part in text.split(",")}))
    raise InputError(f"{option} must be ints of at least 1, such as 8192 or 2048,4096; got {text!r}.")


def check_text_given(what: str, text: str) -> None:
    """Refuse a question, or the like, of nothing but white space, or of bytes that are no text.

    Raises:
        InputError: naming it.
    """
    if not text.strip():
        raise InputError(f"{what} is empty. Write at least one word.")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes that Python could not read stand there as halves of characters
        octet = f"0x{ord(text[error.start]) & 0xFF:02x}"
        raise InputError(
            f"{what} is not UTF-8: byte {octet} after {error.start} characters. Write it in UTF-8."
        ) from None
