"""What a server allows itself and others."""

from dataclasses import dataclass

from activation_beacon.errors import InputError
from activation_beacon.ratios import Ratio
from activation_beacon.server.addresses import ANY, host_name, origin_name

API_KEY = "BEACON_API_KEY"  # variable of the environment

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Settings:
    """Settings of `beacon serve`; an empty key, and an origin that is none, are refused with an InputError.

    Attributes:
        folder: where contexts are kept: a path, or any address that fsspec knows.
        model_name: what clients call the model.
        ratio: of prompts and contexts that name none.
        api_key: what clients must send as a bearer token; None for no key.
        memory_bytes: contexts and conversations kept in memory.
        disk_bytes: files in the folder; None for no limit. Nothing is deleted to keep it: creating is refused.
        max_body_bytes: of a request, an uploaded file included.
        max_rows: answers written, and texts read, at a time.
        max_waiting: requests that may wait; further ones get 429.
        batch_bytes: keys and values of all answers that are decoded together.
        max_tokens: of an answer, where a request names no number.
        answer_s: seconds that a request for answers may take, waiting included.
        compress_s: seconds that a request for a context may take.
        shutdown_s: seconds that requests get to finish when the server stops.
        cors_origins: pages of other origins that may call the server; "*" for all.
        allowed_hosts: names that requests may call the server by; none, or "*" among them, for any.
    """

    folder: str = "contexts"
    model_name: str = "default"
    ratio: Ratio = "auto"
    api_key: str | None = None
    memory_bytes: int = 4 * GIB
    disk_bytes: int | None = None
    max_body_bytes: int = 32 * MIB
    max_rows: int = 16
    max_waiting: int = 64
    batch_bytes: int = 8 * GIB
    max_tokens: int = 512
    answer_s: float = 600.0
    compress_s: float = 7200.0
    shutdown_s: float = 20.0
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.api_key == "":
            raise InputError(
                f"The API key is empty, which would let everybody in. Give one (--api-key, or {API_KEY}), or unset it."
            )
        object.__setattr__(self, "cors_origins", tuple(map(origin_name, self.cors_origins)))
        hosts = () if ANY in self.allowed_hosts else tuple(map(host_name, self.allowed_hosts))
        object.__setattr__(self, "allowed_hosts", hosts)
