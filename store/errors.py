"""Every error that posae raises for its user; each is also the built-in error it resembles.

A message says what is wrong, where, and what to do next, in one line: the command line prints it
and exits with 1. Any other exception is a bug and keeps its traceback.

    PosaeError
    ├── SettingsError (ValueError)              a setting is unknown, impossible or contradicts another
    ├── StoreError
    │   ├── StoreNotFoundError (FileNotFoundError)  there is no store here
    │   ├── StoreFormatError (ValueError)       not a store of ours, or one of a newer format
    │   ├── StoreDamagedError (ValueError)      bytes are missing or not what was written
    │   ├── StoreMismatchError (ValueError)     the store was made with other settings
    │   ├── StoreIncompleteError (LookupError)  the requested part is not committed yet
    │   ├── StoreReadError (OSError)            the disk could not read an existing file
    │   ├── StoreWriteError (OSError)           the disk refused: no space, no permission
    │   └── StoreRemoteError (ConnectionError)  a server refused, or does not answer
    └── those of models, text and runs          pipeline/errors.py
"""


class PosaeError(Exception):
    """The root of every error that posae raises for its user."""


class SettingsError(PosaeError, ValueError):
    """A setting is unknown, impossible or contradicts another."""


class StoreError(PosaeError):
    """Something about a store."""


class StoreNotFoundError(StoreError, FileNotFoundError):
    """There is no store here."""


class StoreFormatError(StoreError, ValueError):
    """Not a store of ours, or one of a newer format."""


class StoreDamagedError(StoreError, ValueError):
    """Bytes are missing or not what was written.

    Attributes:
        array: name of the array, or path of the metadata file.
        shard: index of the shard, or None.
        chunk: index of the chunk within its shard, or None.
        problem: what is wrong, without the place.
    """

    def __init__(
        self,
        problem: str,
        *,
        array: str,
        shard: int | None = None,
        chunk: int | None = None,
        remedy: str = "restore this file from a copy of the store",
    ) -> None:
        """Compose the message of place, problem and remedy."""
        self.array, self.shard, self.chunk, self.problem = array, shard, chunk, problem
        place = array
        if shard is not None:
            place += f", shard {shard}"
        if chunk is not None:
            place += f", chunk {chunk}"
        super().__init__(f"{place}: {problem}; {remedy}")


class StoreMismatchError(StoreError, ValueError):
    """The store was made with other settings."""


class StoreIncompleteError(StoreError, LookupError):
    """The requested part is not committed yet."""


class StoreReadError(StoreError, OSError):
    """The disk could not read an existing file: no permission, a failing disk, a stale network mount.

    Attributes:
        errno: of the system's error.
        strerror: its text.
    """

    def __init__(self, place: object, error: OSError) -> None:
        """Compose the message of the file and the system's error."""
        super().__init__(
            f"{place} cannot be read ({error.strerror}); check the disk and its permissions, then run the "
            "same command again"
        )
        self.errno, self.strerror = error.errno, error.strerror

    def __str__(self) -> str:
        """The message; OSError would show the number."""
        return str(self.args[0])


class StoreWriteError(StoreError, OSError):
    """The disk refused: no space, no permission."""


class StoreRemoteError(StoreError, ConnectionError):
    """A server refused, or does not answer."""
