"""The text of one request's output, made once, token by token. Knows nothing of steps, logits or who reads it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from isologit.engine.request import SamplingParams
from isologit.engine.stop_strings import StopMatch, StopSearch, StopStrings
from isologit.text.detokenizer import Detokenizer
from isologit.text.tokenizer import Tokenizer


class OutputText:
    """What each token made certain, what of it may be shown, and where a stop string ends it.

    token_texts: the text that each token made certain, often nothing for a part of a character; joined, they are the
    whole text, what a stop string cuts off included. stop: the stop string that was found. A stop string is looked for
    in what comes after the first `min_tokens` tokens, though it may begin before; special tokens, which no text shows,
    take part in the search with their names. inner: the text stands behind another (see `Detokenizer`).
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, *, inner: bool = False) -> None:
        self.token_texts: list[str] = []
        self.stop: str | None = None
        self._tokenizer = tokenizer
        self._decode = tokenizer.inner_text if inner else tokenizer.decode
        self._detokenizer = Detokenizer(tokenizer, inner=inner)
        self._search = StopSearch(StopStrings(params.stop)) if params.stop else None
        self._longest_stop = max(map(len, params.stop), default=0)
        self._min_tokens = params.min_tokens
        self._include_stop = params.include_stop_str_in_output
        self._num_characters = 0
        self._end: int | None = None  # characters of the text that remain; None until it is over
        self._num_shown = 0
        self._not_shown = ""
        # NOTE: a special token's name is searched but never shown: (its place in what was searched, its length)
        self._names: deque[tuple[int, int]] = deque()
        self._passed_names = 0  # characters of the names that no match can reach back to

    def push(self, token_id: int) -> bool:
        """Take the next token; whether a stop string is complete, after which there must be no other token."""
        text = self._detokenizer.push(token_id)
        self.token_texts.append(text)
        self._num_characters += len(text)
        self._not_shown += text
        if self._search is None:
            return False
        if token_id in self._tokenizer.special_token_ids:
            text = self._tokenizer.token_name(token_id)
            self._names.append((self._search.num_characters, len(text)))
        return self._stop_at(self._search.feed(text))

    def show(self) -> str:
        """What may be shown since the last call: what cannot be the beginning of a stop string."""
        if self._search is None and self._end is None:
            shown, self._not_shown = self._not_shown, ""
            self._num_shown = self._num_characters
            return shown
        end = self._end
        if end is None:
            assert self._search is not None
            end = self._shown_before(self._search.num_characters - self._search.num_held)
        if end <= self._num_shown:
            return ""
        shown, self._not_shown = self._not_shown[: end - self._num_shown], self._not_shown[end - self._num_shown :]
        self._num_shown = end
        return shown

    def finish(self, token_ids: Sequence[int], *, by_stop_token: bool = False) -> str:
        """The whole text, up to a stop string; by_stop_token: what the last of the tokens says is left out.

        The rest that no further token can change counts to the last token, and may complete a stop string. Tokens that
        were never pushed are decoded together.
        """
        hide_last = by_stop_token and not self._include_stop
        if not self.token_texts:
            return self._decode(list(token_ids[:-1] if hide_last else token_ids))
        rest = self._detokenizer.finish()
        if rest:
            self.token_texts[-1] += rest
            self._num_characters += len(rest)
            self._not_shown += rest
            if self._search is not None and self._end is None:
                self._stop_at(self._search.feed(rest))
        if self._end is None:
            self._end = self._num_characters - (len(self.token_texts[-1]) if hide_last else 0)
        return "".join(self.token_texts)[: self._end]

    def _stop_at(self, match: StopMatch | None) -> bool:
        if match is None or len(self.token_texts) <= self._min_tokens:
            return False
        self.stop = match.stop
        self._end = self._shown_before(match.end if self._include_stop else match.begin)
        return True

    def _shown_before(self, place: int) -> int:
        """Characters of the text before a place in what was searched."""
        names, num_searched = self._names, 0 if self._search is None else self._search.num_characters
        while names and sum(names[0]) < num_searched - self._longest_stop:
            self._passed_names += names.popleft()[1]
        return place - self._passed_names - sum(min(max(0, place - start), length) for start, length in names)
