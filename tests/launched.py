"""Several processes of one program, as torchrun starts them."""

import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def run_together(count: int, command: Sequence[str], **options) -> list[tuple[int, str]]:
    """The exit status and output of each."""
    shared = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parent),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    members = [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )
        for rank in range(count)
    ]
    outputs = [member.communicate(timeout=300)[0] for member in members]
    return [(member.returncode, output) for member, output in zip(members, outputs, strict=True)]
