"""Finding stop strings in text that grows. Knows characters only: neither tokens nor what a match means."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string that was found; `begin` and `end` count the characters that were fed before them."""

    begin: int
    end: int
    stop: str


class StopStrings:
    """The automaton of Aho and Corasick (1975): each character costs the same, however many strings and however long.

    A state is the longest end of the text so far that begins a stop string; 0 is the state of none.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self._edges: list[dict[str, int]] = [{}]
        self._fallback = [0]  # state of the longest proper end of a state
        self.found = [-1]  # number of the longest stop string that ends in a state, -1 for none
        self.num_held = [0]  # characters at the end of a state that begin a stop string which is not complete
        for number, stop in enumerate(stops):
            self._insert(stop, number)
        self._link()

    def _insert(self, stop: str, number: int) -> None:
        state = 0
        for character in stop:
            if character not in self._edges[state]:
                self._edges[state][character] = len(self._edges)
                self._edges.append({})
                self.num_held.append(self.num_held[state] + 1)
                self._fallback.append(0)
                self.found.append(-1)
            state = self._edges[state][character]
        if self.found[state] < 0:
            self.found[state] = number

    def _link(self) -> None:
        """Fallbacks, shortest states first."""
        queue = deque(self._edges[0].values())
        while queue:
            state = queue.popleft()
            fallback = self._fallback[state]
            if self.found[state] < 0:
                self.found[state] = self.found[fallback]
            if not self._edges[state]:
                self.num_held[state] = self.num_held[fallback]
            for character, following in self._edges[state].items():
                self._fallback[following] = self.step(fallback, character)
                queue.append(following)

    def step(self, state: int, character: str) -> int:
        """The state after one more character."""
        edges, fallback = self._edges, self._fallback
        while (following := edges[state].get(character)) is None:
            if state == 0:
                return 0
            state = fallback[state]
        return following


class StopSearch:
    """Where the search in one text stands."""

    def __init__(self, strings: StopStrings) -> None:
        self._strings = strings
        self._state = 0
        self.num_characters = 0

    @property
    def num_held(self) -> int:
        """Characters at the end of the text that may be the beginning of a stop string."""
        return self._strings.num_held[self._state]

    def feed(self, text: str) -> StopMatch | None:
        """Take more text; of the stop strings that end in it the one that begins first, then the one listed first."""
        strings, state = self._strings, self._state
        best: tuple[int, int, int] | None = None  # begin, number, end
        for end, character in enumerate(text, self.num_characters + 1):
            state = strings.step(state, character)
            number = strings.found[state]
            if number >= 0:
                begin = end - len(strings.stops[number])
                if best is None or (begin, number) < best[:2]:
                    best = begin, number, end
        self._state = state
        self.num_characters += len(text)
        return None if best is None else StopMatch(best[0], best[2], strings.stops[best[1]])
