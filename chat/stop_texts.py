"""Texts that end an answer, found while it is streamed."""

from __future__ import annotations

from collections.abc import Sequence


class StopTexts:
    """Passes text on until the first of ``stops`` begins in it; neither the stop nor what follows is passed on."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """What is certain by now; an end that may be the beginning of a stop is held back."""
        if self.found:
            return ""
        self._held += text
        begins = [index for index in map(self._held.find, self._stops) if index >= 0]
        if begins:
            self.found = True
            certain, self._held = self._held[: min(begins)], ""
            return certain
        keep = self._possible_stop()
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain

    def finish(self) -> str:
        """What was held back when the answer ends."""
        held, self._held = self._held, ""
        return held

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that could go on to become a stop."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
