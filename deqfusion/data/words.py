"""Words of short texts as numbers: 0 is padding, 1 a word that is not known, the others follow."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

UNKNOWN = 1
_FIRST = 2
# "the man's dog isn't" -> the, man, 's, dog, isn't.
_WORD = re.compile(r"'s\b|\w+(?:'(?!s\b)\w+)*")


def split_words(text: str) -> list[str]:
    """Return the lower-case words of a text, a possessive or contracted 's by itself."""
    return _WORD.findall(text.lower().replace("’", "'"))


def word_vocabulary(texts: Iterable[str], min_count: int = 2) -> dict[str, int]:
    """Number the words of texts.

    Args:
        texts: of the training part.
        min_count: how often a word must occur; rarer ones teach what an unknown word is like.

    Returns:
        Numbers from 2 by word, the most frequent first, alphabetical where equally frequent.
    """
    counts = Counter(word for text in texts for word in split_words(text))
    kept = [word for word, count in counts.items() if count >= min_count]
    kept.sort(key=lambda word: (-counts[word], word))
    return {word: number for number, word in enumerate(kept, start=_FIRST)}


def encode_words(
    texts: Sequence[str], vocabulary: dict[str, int], max_words: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Write texts as numbers of words.

    Args:
        texts: a text without any word becomes one unknown word.
        vocabulary: of `word_vocabulary`.
        max_words: what a longer text is cut to.

    Returns:
        int64 (texts, max_words), padded by 0 at the end, and the number of words of each (texts,).
    """
    numbers = np.zeros((len(texts), max_words), dtype=np.int64)
    counts = np.ones(len(texts), dtype=np.int64)
    for row, text in enumerate(texts):
        found = [vocabulary.get(word, UNKNOWN) for word in split_words(text)[:max_words]]
        found = found or [UNKNOWN]
        numbers[row, : len(found)] = found
        counts[row] = len(found)
    return numbers, counts
