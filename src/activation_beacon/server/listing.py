"""Which tokens of an answer are listed with their probabilities, and where in its text each begins."""

from dataclasses import dataclass

from activation_beacon.server.sampling import Chosen


@dataclass(frozen=True)
class Listed:
    """A token that is listed, and the characters of the answer before the one that it begins or goes on with."""

    chosen: Chosen
    offset: int


class Listing:
    """Lists the tokens of one answer as its text is sent: not before their text, and those of a stop text never."""

    def __init__(self) -> None:
        self._num_sent = 0
        self._waiting: list[Listed] = []

    def add(self, text: str, chosen: Chosen, offset: int) -> list[Listed]:
        """Tokens to be listed with a piece of text, after one more token that begins at `offset`."""
        self._waiting.append(Listed(chosen, offset))
        return self._with(text)

    def end(self, text: str, *, is_cut: bool) -> list[Listed]:
        """Tokens to be listed with the last piece of text; those that have none only where nothing was cut off."""
        listed = self._with(text)
        return listed if is_cut else [*listed, *self._waiting]

    def _with(self, text: str) -> list[Listed]:
        self._num_sent += len(text)
        listed = [each for each in self._waiting if each.offset < self._num_sent]
        self._waiting = self._waiting[len(listed) :]
        return listed
