"""The tree of errors. Every error the package raises on purpose is a `TQSearchError`.

Errors about arguments also derive from the built-in a caller would expect (`ValueError`, `KeyError`), so that code that
does not know this package still catches them.
"""


class TQSearchError(Exception):
    """The root: whatever this package raises on purpose."""


class InvalidInputError(TQSearchError, ValueError):
    """An argument has the wrong shape, dtype or value; nothing was changed."""


class UnknownIdError(TQSearchError, KeyError):
    """An id that was asked for is not in the index; nothing was changed."""

    def __str__(self) -> str:
        """The message as written: `KeyError` would show it quoted."""
        return str(self.args[0]) if self.args else ""


class DuplicateIdError(InvalidInputError):
    """An id was given twice, or is in the index already; nothing was changed."""


class FormatError(TQSearchError):
    """A file cannot be read as an index; the subclasses say why."""


class ForeignFileError(FormatError):
    """The file is not a tqsearch file."""


class CorruptFileError(FormatError):
    """The file is truncated or altered: its length or its checksum does not match."""


class NewerFormatError(FormatError):
    """The file was written by a newer version of the format than this package reads."""


class DatasetError(TQSearchError):
    """A data set is not known, cannot be downloaded, or does not match its checksum; the message says what to do."""


class BackendError(TQSearchError, RuntimeError):
    """The backend that was asked for cannot run here; the message names the remedy."""
