"""N-gram speculation: steps of few rows compute tokens that were guessed from a row's own text, too.

A decode step of few rows waits for the model's weights, whether it computes one token a row or several. So a row is
given drafts: what followed its last N tokens where they stood before (prompt lookup decoding, A. Saxena, 2023). A draft
is a decode row of its own, at the next position of the same slot, and needs nothing of a runner. What is sampled at a
draft is the row's next token if all drafts up to there are what was sampled before them. The noise of a token depends
on (seed, position) alone, so drawn rows get the tokens that they would have got, too.
"""

from collections.abc import Sequence

NGRAM = 3
MAX_COUNTED = 64  # tokens at the end of a long prompt; more are never guessed at once


class Lookup:
    """Where each N-gram of a text was followed by a token last, and how many tokens on end that has told right."""

    def __init__(self) -> None:
        self.streak = 0
        self.tokens: list[int] = []  # that were learned
        self._places: dict[tuple[int, ...], int] = {}

    def learn(self, more: Sequence[int]) -> None:
        """Go on with the text. Of a long piece, only what is told right at its end counts: that is much faster."""
        tokens, places, first = self.tokens, self._places, max(len(self.tokens), NGRAM)
        tokens.extend(more)
        if (counted := len(tokens) - MAX_COUNTED) > first:
            ngrams = zip(*(tokens[first - i : counted - i] for i in range(NGRAM, 0, -1)), strict=True)
            places.update(zip(ngrams, range(first, counted), strict=True))
            first, self.streak = counted, 0
        for end in range(first, len(tokens)):
            ngram = tuple(tokens[end - NGRAM : end])
            place = places.get(ngram)
            self.streak = self.streak + 1 if place is not None and tokens[place] == tokens[end] else 0
            places[ngram] = end

    def guess(self, most: int) -> list[int]:
        """Up to `most` tokens that may come next: no more than have been told right, one by one, until now."""
        tokens, place = self.tokens, self._places.get(tuple(self.tokens[-NGRAM:]))
        if place is None:
            return []
        period = len(tokens) - place  # a text that repeats itself goes on repeating
        return [tokens[place + i % period] for i in range(min(most, self.streak))]
