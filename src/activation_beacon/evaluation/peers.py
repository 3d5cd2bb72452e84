"""Methods of another project, kvpress, which runs them itself in an environment of its own; prompts and answers go as files.

kvpress needs an older transformers than this package. What it has to do stands in DIR/peers/jobs.jsonl, what it did is appended to
DIR/peers/answers.jsonl, line by line: answers are taken from there, also those of a run that was killed.
"""

import contextlib
import hashlib
import json
import subprocess
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from activation_beacon.errors import PeerError, reason
from activation_beacon.evaluation.methods import beacon_entries
from activation_beacon.evaluation.results import Key
from activation_beacon.evaluation.samples import Sample, answer_sample, asked_ids, scored
from activation_beacon.files import write_text
from activation_beacon.json_lines import lines_from
from activation_beacon.peers_environment import PYTHON, environment, model_options, require_python
from activation_beacon.prompts import ChatPrompt
from activation_beacon.row_ends import end_ids

PEERS = {
    "snapkv": "what the last tokens look at (SnapKV)",
    "expected-attention": "what later tokens are expected to look at (ExpectedAttention)",
    "pyramidkv": "as SnapKV, more in lower layers (PyramidKV)",
    "kvzip": "what it takes to repeat the text (KVzip)",
    "knorm": "keys of small norm (Knorm)",
    "streaming-llm-kvpress": "first tokens and last ones (StreamingLLM)",
}
FOLDER, JOBS, ANSWERS = "peers", "jobs", "answers"  # files of processes that are not the first: jobs-1.jsonl and so on
WORKER = Path(__file__).with_name("peers_worker.py")
PLAIN = "none"  # the worker's name for reading without compression
CONTROL_TOKENS = 16  # of the control's answer; further on, roundings of two versions of transformers may tell

Wanted = tuple[Key, Sample]
Answered = tuple[str, str, int]  # job, press, entries


@dataclass(frozen=True)
class Peers:
    """Where kvpress is.

    Attributes:
        python: of its environment.
        worker: the program that it runs.

    Raises:
        PeerError: if there is no such python.
    """

    python: Path = PYTHON
    worker: Path = WORKER

    def __post_init__(self) -> None:
        require_python(self.python, list(PEERS))


def peer_records(
    peers: Peers,
    model: Any,
    prompt: ChatPrompt,
    wanted: Sequence[Wanted],
    folder: Path,
    *,
    rank: int = 0,
    say: Callable[[str], None] | None = None,
) -> Iterator[tuple[Key, dict[str, Any]]]:
    """The records of samples under kvpress's methods, as they are finished.

    The first context is answered without compression too, which must be what the method `full` answers.

    Args:
        peers: where kvpress is.
        model: with beacons attached; its base is what kvpress loads.
        prompt: of its tokenizer.
        wanted: keys with a method of `PEERS`, and their samples.
        folder: of the results.
        rank: of this process among those that evaluate together, each with a kvpress of its own.
        say: called with each line that kvpress's process says.

    Raises:
        PeerError: if kvpress cannot be run, or its answers without compression are others than ours.
        StorageError: if the jobs cannot be written.
    """
    exchange = _Exchange(folder / FOLDER, rank)
    jobs: dict[str, dict[str, Any]] = {}
    asked_for: dict[Answered, list[Wanted]] = {}
    for key, sample in wanted:
        job = _job(model, prompt, sample)
        assert isinstance(key.ratio, int)  # all of PEERS have one
        way = (key.method, beacon_entries(model, len(job["context"]), key.ratio))
        jobs.setdefault(job["id"], job)["ways"][way] = {"press": way[0], "entries": way[1]}
        asked_for.setdefault((job["id"], *way), []).append((key, sample))
    first, sample = next(iter(jobs.values())), wanted[0][1]
    control = (first["id"], PLAIN, len(first["context"]))
    left = {control, *asked_for}
    with contextlib.closing(exchange.answers(peers, model, _with_control(jobs), say)) as lines:
        for line in lines:
            done = (line["job"], line["press"], line["entries"])
            if done not in left:
                continue
            left.remove(done)
            if done == control:
                _check_control(model, prompt, sample, line["answers"])
            for key, own_sample in asked_for.get(done, ()):
                yield key, _record(prompt, own_sample, line, len(jobs[done[0]]["context"]))
            if not left:
                return


def _job(model: Any, prompt: ChatPrompt, sample: Sample) -> dict[str, Any]:
    """A context and its questions, as ids. Its own id stands for all that answers depend on."""
    ids, opening, asked = asked_ids(prompt, sample)
    pairs = zip(asked, sample.questions, strict=True)
    job = {
        "context": ids,
        "opening": opening,
        "questions": [{"ids": each, "max_new_tokens": question.max_new_tokens} for each, question in pairs],
        "is_conversation": sample.is_conversation,
        "end_ids": sorted(end_ids(model.generation_config.eos_token_id)),
    }
    text = json.dumps([model.base_fingerprint, str(model.dtype), job])
    return {"id": hashlib.sha256(text.encode()).hexdigest()[:16], **job, "ways": {}}


def _with_control(jobs: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The jobs as they are written: of the first, the control comes first."""
    found = [{**job, "ways": list(job["ways"].values())} for job in jobs.values()]
    found[0]["ways"].insert(0, {"press": PLAIN, "entries": len(found[0]["context"])})
    return found


def _check_control(model: Any, prompt: ChatPrompt, sample: Sample, answers: Sequence[Sequence[int]]) -> None:
    """Refuse an environment in which the same model answers otherwise."""
    expected = answer_sample(model, prompt, sample, "full")["answers"]
    for ids, ours in zip(answers, expected, strict=True):
        start = str(prompt.tokenizer.decode(list(ids[:CONTROL_TOKENS]), skip_special_tokens=True)).strip()
        is_same = ours == start if len(ids) <= CONTROL_TOKENS else ours.startswith(start.rstrip("\ufffd"))
        if not is_same:
            raise PeerError(
                f"Without compression, the environment of kvpress answers {start!r} where the method full answers "
                f"{ours[: len(start) + 20]!r}. Its results could not be compared: check that both load the same base model"
                f"{'' if model.dtype == torch.float32 else ', or use --dtype float32: roundings of half precision may tell'}."
            )
        if sample.is_conversation:
            return  # what follows depends on the whole answer


def _record(prompt: ChatPrompt, sample: Sample, line: Mapping[str, Any], context_tokens: int) -> dict[str, Any]:
    sizes = ("cache_length", "cache_bytes", "only_masks", "read_seconds", "answer_seconds", "by")
    return {
        **scored(prompt, sample, line["answers"]),
        "context_tokens": context_tokens,
        **{name: line[name] for name in sizes},
    }


# --- the other process -----------------------------------------------------------------------------------------------


class _Exchange:
    """The folder where jobs and answers lie."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.jobs, self.path = (folder / f"{name}{f'-{rank}' if rank else ''}.jsonl" for name in (JOBS, ANSWERS))
        self.offset = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PeerError(f"{folder} cannot be made: {reason(error)}. Choose another folder.") from error

    def answers(
        self, peers: Peers, model: Any, jobs: Sequence[Mapping[str, Any]], say: Callable[[str], None] | None
    ) -> Generator[dict[str, Any]]:
        """Answers that are there already, then those that come; ends when the worker does."""
        write_text(self.jobs, "".join(json.dumps(job) + "\n" for job in jobs))
        yield from self._new_lines()
        command = [str(peers.python), "-I", str(peers.worker), str(self.jobs), str(self.path), *model_options(model)]
        last = ""
        with _started(command) as process:
            for text in process.stderr or ():
                last = text.strip() or last
                if say is not None:
                    say(last)
                yield from self._new_lines()
        yield from self._new_lines()
        if process.returncode:
            raise PeerError(
                f"kvpress's process ended with status {process.returncode}: {last or 'it said nothing'}. What is finished is kept."
            )
        raise PeerError(f"kvpress's process ended before all was answered; its last line: {last or 'none'}.")

    def _new_lines(self) -> list[dict[str, Any]]:
        """Whole lines of the answers that have not been read yet."""
        values, self.offset = lines_from(self.path, self.offset)
        return values


@contextlib.contextmanager
def _started(command: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that does not outlive the block."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment(),
        )
    except OSError as error:
        raise PeerError(f"{command[0]} cannot be run: {reason(error)}. Make it anew with `make peers`.") from error
    with process:
        try:
            yield process
            process.wait()
        finally:
            process.kill()
