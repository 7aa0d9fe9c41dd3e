"""The exception of every reader of data."""


class DataError(ValueError):
    """A file or folder of data is not what its format says.

    The message is one line: the file, the line where there is one, what was found there and what
    was expected, so that the command line can print it as it is.
    """
