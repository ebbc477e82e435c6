"""Stop strings: texts that end a text, found also where they come in pieces.

Imports errors.
"""

from collections.abc import Sequence

from ..errors import ArgumentError


class StopStrings:
    """Passes a text on piece by piece, up to the first stop string; what might become one is held back.

    stops : texts, none of them empty

    Raises: ArgumentError.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise ArgumentError(f"stop is {stops!r:.60}; give a list of texts, none of them empty")
        self.stops = tuple(stops)
        self._held = ""
        #: The stop string that has come; None: none has.
        self.found: str | None = None

    def add(self, piece: str) -> str:
        """The text that can be passed on; nothing after a stop string.

        Of several that come with one piece, the one that begins first counts; of those that begin together,
        the one that is given first.
        """
        if self.found is not None:
            return ""
        if not self.stops:
            return piece
        text = self._held + piece
        places = [(at, i) for i, stop in enumerate(self.stops) if (at := text.find(stop)) >= 0]
        if places:
            at, i = min(places)
            self.found, self._held = self.stops[i], ""
            return text[:at]
        num_held = max((_num_begun(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def finish(self) -> str:
        """What was held back, when the text has ended otherwise."""
        held, self._held = self._held, ""
        return held


def _num_begun(text: str, stop: str) -> int:
    """How many characters at the end of the text begin the stop string."""
    for count in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:count]):
            return count
    return 0
