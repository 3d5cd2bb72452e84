"""What can be run: language modelling, and every task whose samples are contexts with questions."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from activation_beacon.config import BeaconConfig
from activation_beacon.data.sources import OnError
from activation_beacon.errors import InputError
from activation_beacon.evaluation import language_modelling
from activation_beacon.evaluation.documents import Text, digests, prefix_ids, read_documents, texts, told_apart
from activation_beacon.evaluation.methods import METHODS
from activation_beacon.evaluation.multi_turn import multi_turn_samples
from activation_beacon.evaluation.names import LOCAL_TOKENS
from activation_beacon.evaluation.needles import KINDS, SCORE, needle_samples
from activation_beacon.evaluation.packed_qa import packed_samples, read_passages
from activation_beacon.evaluation.peers import PEERS
from activation_beacon.evaluation.reconstruction import reconstruction_samples
from activation_beacon.evaluation.results import CONTENTS
from activation_beacon.evaluation.ruler import ruler_samples
from activation_beacon.evaluation.samples import Sample, answer_sample
from activation_beacon.prompts import ChatPrompt
from activation_beacon.ratios import Ratio

SHUFFLED = "shuffled"


class Task(Protocol):
    """Samples, and what a method makes of one.

    Attributes:
        name: in results and reports.
        quality: the field of a record that says how good it is: "nats" (less is better) or "score" (more is).
    """

    name: str
    quality: str

    @property
    def methods(self) -> Mapping[str, bool]:
        """Those that it can be run with, and whether a ratio decides their size."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that its samples depend on, besides their length: runs into one folder must agree in it."""

    def samples(self, length: int) -> Iterator[Any]:
        """The samples of a length, in an order that does not depend on how many are taken."""

    def check(self, model: Any, samples: Sequence[Any], methods: Sequence[str]) -> None:
        """Refuse, before anything is run, samples of a length that these methods cannot be run on."""

    def run(self, model: Any, samples: Sequence[Any], index: int, method: str, ratio: Ratio | None) -> dict[str, Any]:
        """One sample's record; the others are there to be mixed up with it."""


class LanguageModelling:
    """Nats per token after the first chunk; see `language_modelling`.

    Args:
        tokenizer: of the base model.
        paths: files, folders, globs or hub data sets of documents.
        field: where a record's text stands.
        kind_field: where its kind stands, by which reports group; None for documents of no kind.
        on_error: what becomes of a record without one.
    """

    name = "lm"
    quality = "nats"
    methods: ClassVar[Mapping[str, bool]] = {
        "full": False,
        "alone": False,
        "recent": True,
        "beacons": True,
        SHUFFLED: True,
        **dict.fromkeys(LOCAL_TOKENS, True),
    }

    def __init__(
        self,
        tokenizer: Any,
        paths: Sequence[str | Path],
        *,
        field: str = "text",
        kind_field: str | None = None,
        on_error: OnError = "stop",
    ) -> None:
        self.tokenizer = tokenizer
        self.paths = list(paths)
        self.field, self.kind_field, self.on_error = field, kind_field, on_error
        kinds = {} if kind_field is None else {"kind_field": kind_field}
        self.settings = {**_named("documents", paths), "field": field, **kinds, "on_error": on_error}

    def samples(self, length: int) -> Iterator[Text]:
        """Texts of exactly so many tokens, one of each document that is long enough."""
        documents = read_documents(self.paths, field=self.field, kind_field=self.kind_field, on_error=self.on_error)
        found, same = itertools.tee(texts(documents, self.tokenizer, length=length, prefix=self._prefix()))
        for text, name in zip(found, told_apart(text.id for text in same), strict=True):
            yield Text(name, text.ids, text.kind)

    def check(self, model: Any, samples: Sequence[Text], methods: Sequence[str]) -> None:
        """Refuse texts without a token to measure, and to mix up texts that are all the same."""
        for text in samples:
            language_modelling.check_length(len(text.ids), model.beacon_config.chunk_size)
        if SHUFFLED in methods:
            other_value([text.ids for text in samples], 0)

    def run(self, model: Any, samples: Sequence[Text], index: int, method: str, ratio: Ratio | None) -> dict[str, Any]:
        """One text read in one way."""
        text = samples[index]
        other = other_value([sample.ids for sample in samples], index) if method == SHUFFLED else ()
        record = language_modelling.measure(model, text.ids, method, ratio=ratio, prefix=self._prefix(), other=other)
        return {"kind": text.kind, **record} if text.kind else record

    def _prefix(self) -> list[int]:
        return prefix_ids(self.tokenizer)


class Answering:
    """Questions on contexts.

    Args:
        name: of the task.
        prompt: of the tokenizer.
        make: makes the samples of a length.
        settings: see `Task`.
    """

    quality = "score"
    methods = {name: method.has_ratio for name, method in METHODS.items()} | dict.fromkeys(PEERS, True)

    def __init__(
        self, name: str, prompt: ChatPrompt, make: Callable[[int], Iterator[Sample]], settings: Mapping[str, Any]
    ) -> None:
        self.name = name
        self.prompt = prompt
        self.make = make
        self.settings = settings

    def samples(self, length: int) -> Iterator[Sample]:
        """The samples of a length."""
        return self.make(length)

    def check(self, model: Any, samples: Sequence[Sample], methods: Sequence[str]) -> None:
        """Refuse to mix up contexts that are all the same."""
        del model  # questions are asked on contexts of any length
        if SHUFFLED in methods:
            other_value([sample.context for sample in samples], 0)

    def run(
        self, model: Any, samples: Sequence[Sample], index: int, method: str, ratio: Ratio | None
    ) -> dict[str, Any]:
        """One context read in one way, and all its questions asked."""
        context = other_value([sample.context for sample in samples], index) if method == SHUFFLED else None
        return answer_sample(model, self.prompt, samples[index], method, ratio=ratio, context=context)


def other_value(values: Sequence[Any], index: int) -> Any:
    """What another sample has: the nearest before this one, or the next one after, that differs.

    Raises:
        InputError: if there is none.
    """
    for value in itertools.chain(reversed(values[:index]), values[index + 1 :]):
        if value != values[index]:
            return value
    raise InputError(f'The method "{SHUFFLED}" needs samples of two contexts at least. Take more of them (--limit).')


@dataclass(frozen=True)
class Origin:
    """What a background text came from.

    Attributes:
        name: in the results.
        files: whose contents tell it from others of the same name; none for a text that a release comes with.
    """

    name: str = ""
    files: tuple[Path, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """Those that runs into one folder must agree in."""
        return {"background": self.name, **_contents(self.files)}


NAMELESS = Origin()


def _named(name: str, sources: Sequence[str | Path]) -> dict[str, Any]:
    """Sources as settings: by name and contents, wherever they lie."""
    return {name: [Path(source).name for source in sources], **_contents(sources)}


def _contents(sources: Sequence[str | Path]) -> dict[str, Any]:
    found = digests(sources)
    return {CONTENTS: found} if any(found) else {}


def needles(
    prompt: ChatPrompt,
    background: Sequence[int],
    *,
    kinds: Sequence[str] = KINDS,
    depths: int | Sequence[float] = 10,
    repeats: int = 1,
    seed: int = 0,
    source: Origin = NAMELESS,
) -> Answering:
    """The task "needles"; see `needles.needle_samples`. `source` stands for the background in the results."""

    def make(length: int) -> Iterator[Sample]:
        return needle_samples(prompt, background, length, kinds=kinds, depths=depths, repeats=repeats, seed=seed)

    known = depths if isinstance(depths, int) else list(depths)
    settings = {**source.settings, "kinds": list(kinds), "depths": known, "seed": seed, "score": SCORE}
    return Answering("needles", prompt, make, settings)


def multi_turn(
    prompt: ChatPrompt, background: Sequence[int], *, count: int = 10, seed: int = 0, source: Origin = NAMELESS
) -> Answering:
    """The task "multi-turn"; see `multi_turn.multi_turn_samples`."""

    def make(length: int) -> Iterator[Sample]:
        return multi_turn_samples(prompt, background, length, count=count, seed=seed)

    return Answering("multi-turn", prompt, make, {**source.settings, "seed": seed, "score": SCORE})


def reconstruction(
    prompt: ChatPrompt,
    background: Sequence[int],
    *,
    count: int = 10,
    seed: int = 0,
    source: Origin = NAMELESS,
    config: BeaconConfig | None = None,
) -> Answering:
    """The task "reconstruction"; see `reconstruction.reconstruction_samples`."""

    def make(length: int) -> Iterator[Sample]:
        return reconstruction_samples(prompt, background, length, count=count, seed=seed, config=config)

    return Answering("reconstruction", prompt, make, {**source.settings, "seed": seed})


def packed_qa(
    prompt: ChatPrompt, paths: Sequence[str | Path], *, seed: int = 0, on_error: OnError = "stop"
) -> Answering:
    """The task "qa"; see `packed_qa.packed_samples`."""
    passages = read_passages(paths, on_error=on_error)

    def make(length: int) -> Iterator[Sample]:
        return packed_samples(prompt, passages, length, seed=seed)

    return Answering("qa", prompt, make, {**_named("files", paths), "seed": seed, "on_error": on_error})


def ruler(prompt: ChatPrompt, *, names: Sequence[str] = (), count: int = 10, seed: int = 0) -> Answering:
    """The task "ruler"; see `ruler.ruler_samples`."""

    def make(length: int) -> Iterator[Sample]:
        return ruler_samples(prompt.tokenizer, length, tasks=names, count=count, seed=seed)

    return Answering("ruler", prompt, make, {"tasks": list(names) or "all", "seed": seed})
