"""Errors of models, text and runs; store/errors.py has those of stores and the base classes.

PosaeError
├── ModelError (ValueError)                 a language model that is missing, gated or unfit
├── CorpusError (ValueError)                text that is missing, too little or not text
├── ForeignFileError (ValueError)           a file of another program that cannot be imported
└── RunError
├── RunNotFoundError (FileNotFoundError)  there is no run here
├── RunBusyError (BlockingIOError)      another process trains the run
└── RunMismatchError (ValueError)       the run was begun with other settings or another store
"""

from ..store.errors import PosaeError


class ModelError(PosaeError, ValueError):
    """A language model that is missing, gated or unfit."""


class CorpusError(PosaeError, ValueError):
    """Text that is missing, too little or not text."""


class ForeignFileError(PosaeError, ValueError):
    """A file of another program that cannot be imported."""


class RunError(PosaeError):
    """Something about a run."""


class RunNotFoundError(RunError, FileNotFoundError):
    """There is no run here."""


class RunBusyError(RunError, BlockingIOError):
    """Another process trains the run."""


class RunMismatchError(RunError, ValueError):
    """The run was begun with other settings or another store."""
