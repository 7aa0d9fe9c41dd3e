"""Words: where texts are divided, which are numbered, how texts become rows of numbers."""

from deqfusion.data.words import UNKNOWN, encode_words, split_words, word_vocabulary


def test_words_are_divided_at_spaces_punctuation_and_possessives():
    assert split_words("Isn't the man's T-shirt, red?") == [
        *("isn't", "the", "man", "'s", "t", "shirt", "red")
    ]
    assert split_words("What’s 2:50 o'clock?!") == ["what", "'s", "2", "50", "o'clock"]
    assert split_words("?!") == []


def test_frequent_words_are_numbered_from_two():
    vocabulary = word_vocabulary(["a cat", "a dog", "the cat"], min_count=2)
    assert vocabulary == {"a": 2, "cat": 3}
    assert word_vocabulary(["b a"], min_count=1) == {"a": 2, "b": 3}


def test_texts_are_padded_and_cut():
    numbers, counts = encode_words(["a cat", "a", "?", "cat sat cat a"], {"a": 2, "cat": 3}, 3)
    assert numbers.tolist() == [[2, 3, 0], [2, 0, 0], [UNKNOWN, 0, 0], [3, UNKNOWN, 3]]
    assert counts.tolist() == [2, 1, 1, 3]
