"""kvpress beside us: its own process, in an environment of its own, times its presses on the same texts."""

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from activation_beacon.bench.measure import WARM_UP_TOKENS, Cell, warm_up_length
from activation_beacon.bench.timing import Run
from activation_beacon.errors import PeerError, reason
from activation_beacon.layouts import entries_held
from activation_beacon.peers_environment import environment, last_line, model_options, require_python

PRESSES = ("snapkv", "expected-attention", "pyramidkv", "knorm")  # those that free what they drop
WORKER = Path(__file__).with_name("peers_worker.py")


class TimedPeers:
    """The process of kvpress, which waits for texts; made by `timed_peers`."""

    def __init__(self, process: subprocess.Popen[str], errors: Any, model: Any) -> None:
        self._process, self._errors = process, errors
        self._vocabulary, self._config = model.get_input_embeddings().weight.shape[0], model.beacon_config

    def run(self, cell: Cell, num_new: int) -> Run:
        """Read and continue the texts of a cell with its press.

        Raises:
            PeerError: if its process has ended.
            torch.OutOfMemoryError: if it does not fit the GPU.
        """
        assert cell.ratio is not None, "kvpress is run at as many entries as beacons hold"
        # A last chunk that is whole is closed as writing begins.
        entries = entries_held(self._config, cell.length + 1, cell.ratio) - 1
        job = {"press": cell.press, "length": cell.length, "batch_size": cell.batch_size, "entries": entries}
        job |= {"num_new": num_new, "vocabulary": self._vocabulary}
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # a process that has ended says why below
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._errors.seek(0)
            raise PeerError(
                f"kvpress's process ended with status {status}: {last_line(self._errors.read())}. "
                "Leave --peers out, or go on with the same --output: finished runs are kept there."
            )
        found = json.loads(line)["run"]
        if found is None:
            raise torch.OutOfMemoryError
        return Run(**found)


@contextlib.contextmanager
def timed_peers(model: Any, presses: Sequence[str], ratios: Sequence[int], python: Path) -> Iterator[TimedPeers]:
    """A process that runs kvpress on the base of `model`, warmed up, until the block ends.

    Args:
        model: with beacons attached.
        presses: out of `PRESSES`.
        ratios: whose entries are warmed up with.
        python: of an environment with kvpress (`make peers`).

    Raises:
        PeerError: if there is no such python, or it cannot run kvpress.
    """
    require_python(python, presses)
    with contextlib.ExitStack() as stack:
        errors = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        options = [*model_options(model, folder), "--threads", str(torch.get_num_threads())]
        try:
            process = subprocess.Popen(
                [str(python), "-I", str(WORKER), *options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment(),
            )
        except OSError as error:
            raise PeerError(f"{python} cannot be run: {reason(error)}. Make it anew with `make peers`.") from error
        stack.enter_context(process)
        stack.callback(_close, process)
        peers = TimedPeers(process, errors, model)
        for press in presses:
            for ratio in ratios:
                peers.run(Cell(warm_up_length(model), 1, ratio, 0, press), WARM_UP_TOKENS)
        yield peers


def _close(process: subprocess.Popen[str]) -> None:
    """End a process; what could not be written to it is of no use any more."""
    process.kill()
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
