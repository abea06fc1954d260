"""Documents: the text that a harvest reads, from the standard library, local files or the Hub.

``open_corpus`` turns a name into a ``Corpus``. Text is loaded only when ``documents`` is iterated, a little
at a time: a line of JSON, some rows of Parquet, a whole ``.txt`` file (one document). Opening local files
reads them once for the digest (about 1 s per GB); opening a dataset of the Hub requests its revision and list
of files (seconds), and iterating streams it, so a harvest downloads about as much as it uses.

Files may come from strangers: they are parsed as text, JSON or Parquet, never unpickled, and a dataset's code
is never run.
"""

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple, Protocol, cast

from ....store.errors import SettingsError
from ...digests import reading, sha256
from ...errors import CorpusError
from ...progress import Progress, Silent
from .stdlib import SPLITS, stdlib_documents, stdlib_revision

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
"""Supported endings of local files."""

_ROWS = 256
_NAMES_SHOWN = 20


class Corpus(NamedTuple):
    """A text, and what the manifest records of it.

    Attributes:
        id: ``stdlib``, the Hub's id, or the base name of the local file or folder.
        revision: identifies the text: Python version and digest of the standard library, commit
            of the Hub's dataset, or ``sha256:`` and 16 digits of the local files' digest.
        split: part of the dataset; None for local files.
        column: the column of text in JSON objects or tables; None for text files.
        documents: starts a new iteration at the first document; the order is fixed.
    """

    id: str
    revision: str | None
    split: str | None
    column: str | None
    documents: Callable[[], Iterator[str]]


def open_corpus(
    dataset: str,
    *,
    split: str | None = None,
    column: str = "text",
    config: str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """The corpus that ``dataset`` names.

    ``stdlib`` is the text of the standard library. A name that exists as a path, begins with ``.``,
    ``/`` or ``~``, or ends in one of ``SUFFIXES`` is a local file or a folder of files (recursively,
    without hidden ones, in the order of their paths). Anything else is an id of the Hub.
    A missing value (JSON or Parquet null) is an empty document.

    Args:
        dataset: the name.
        split: ``all`` by default for stdlib, ``train`` for the Hub; local files have none.
        column: where the text lies in JSON and Parquet.
        config: part of a dataset of the Hub that names several.
        revision: branch, tag or commit on the Hub; stdlib and local files must have it.
        progress: receives the progress of reading large local files for their digest.

    Raises:
        SettingsError: a setting that this kind of corpus does not have.
        CorpusError: the corpus, split or revision is not there or not allowed. Iterating
            ``documents`` raises it for what is not text, and where the column is missing.
    """
    if not dataset.strip():
        raise SettingsError("the name of the dataset is empty; give stdlib, a file, a folder or a Hub id")
    path = None if dataset == "stdlib" else local_path(dataset)
    if dataset != "stdlib" and path is None:
        return _hub_corpus(dataset, split or "train", column, config, revision)
    if config is not None:
        raise SettingsError(f"{dataset}: only datasets on the Hub have configs; leave out --dataset-config")
    if path is None:
        corpus = _stdlib_corpus(split or "all")
    elif split is not None:
        raise SettingsError(f"{dataset}: local files have no splits; leave out --split")
    else:
        corpus = _local_corpus(path, column, progress or Silent())
    if revision not in (None, corpus.revision):
        raise CorpusError(
            f"{dataset} is at revision {corpus.revision}, not {revision}; "
            "leave out --dataset-revision, or find that text"
        )
    return corpus


def _stdlib_corpus(split: str) -> Corpus:
    if split not in SPLITS:
        raise CorpusError(f"stdlib has no split {split!r}; it has {', '.join(SPLITS)}")
    return Corpus("stdlib", stdlib_revision(), split, None, lambda: stdlib_documents(split))


# Local files


def local_path(dataset: str) -> Path | None:
    """The path that ``dataset`` means, or None if it can only be an id of the Hub."""
    path = Path(dataset)
    try:
        path = path.expanduser()
        exists = path.exists()
    except (OSError, RuntimeError):  # a name too long for a path, the home of nobody
        exists = False
    is_local = exists or dataset.startswith((".", "/", "~")) or _is_text(path)
    return path if is_local else None


def _is_text(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def _kind(file: Path) -> str:
    """``txt``, ``jsonl`` or ``parquet``."""
    return file.name.lower().removesuffix(".gz").rpartition(".")[2]


def _local_corpus(path: Path, column: str, progress: Progress) -> Corpus:
    with _reading(path):
        if path.is_dir():
            relative = (file.relative_to(path) for file in path.rglob("*"))
            visible = (r for r in relative if not any(part.startswith(".") for part in r.parts))
            texts = (r for r in visible if _is_text(r) and (path / r).is_file())
            files = [path / r for r in sorted(texts, key=Path.as_posix)]
            if not files:
                raise CorpusError(f"{path}: no file in this folder ends in {', '.join(SUFFIXES)}")
        elif path.is_file():
            files = [path]
            if not _is_text(path):
                raise CorpusError(
                    f"{path}: not one of the supported formats ({', '.join(SUFFIXES)}); convert it"
                )
        elif path.exists():
            raise CorpusError(f"{path} is neither a file nor a folder; give one")
        else:
            raise CorpusError(
                f"{path}: no such file or folder; check the path (a Hub id has the form owner/name)"
            )
    return Corpus(
        id=path.name if path.name not in ("", "..") else path.resolve().name,
        revision=_digest(files, path, progress),
        split=None,
        column=column if any(_kind(file) != "txt" for file in files) else None,
        documents=lambda: _local_documents(files, column),
    )


def _digest(files: list[Path], root: Path, progress: Progress) -> str:
    """The SHA-256 of a single file, or of a folder's listing.

    The listing is in the format of ``sha256sum``: a line of digest, two spaces and path per file.
    """
    listing, digest = hashlib.sha256(), ""
    with _reading(root), reading("digest of the text", files, progress) as advance:
        for file in files:
            with _reading(file):
                digest = sha256(file, advance)
            listing.update(digest.encode() + b"  " + os.fsencode(file.relative_to(root)) + b"\n")
    return f"sha256:{(digest if files == [root] else listing.hexdigest())[:16]}"


def _local_documents(files: list[Path], column: str) -> Iterator[str]:
    for file in files:
        with _reading(file):
            if _kind(file) == "parquet":
                yield from _parquet_documents(file, column)
            elif _kind(file) == "jsonl":
                yield from _jsonl_documents(file, column)
            else:
                with _open(file) as stream:
                    yield _decoded(stream.read(), file, 0)


@contextmanager
def _reading(file: Path) -> Generator[None]:
    """Name the file in an error of reading."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:  # the last two: a .gz cut off or damaged
        problem = getattr(error, "strerror", None) or error
        raise CorpusError(
            f"{file}: cannot be read ({_one_line(problem)}); check the file and its permissions"
        ) from error


def _open(file: Path) -> IO[bytes]:
    if file.name.lower().endswith(".gz"):
        return cast("IO[bytes]", gzip.open(file, "rb"))
    return file.open("rb")


def _decoded(data: bytes, file: Path, offset: int) -> str:
    """The text of ``data``, which begins at byte ``offset`` of the (unpacked) file."""
    problem = "NUL"
    at = data.find(0)
    if at < 0:
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            problem, at = f"0x{data[error.start]:02x}", error.start
        else:
            return text.removeprefix("\ufeff") if offset == 0 else text  # a byte order mark
    raise CorpusError(
        f"{file}: byte {offset + at:,} is {problem}, so this is not UTF-8 text; "
        "convert the file (iconv -t UTF-8) or leave it out"
    )


def _jsonl_documents(file: Path, column: str) -> Iterator[str]:
    offset = 0
    with _open(file) as stream:
        for number, line in enumerate(stream, 1):
            text = _decoded(line, file, offset)
            offset += len(line)
            if not text.strip():
                continue
            place = f"{file}, line {number:,}"
            try:
                row: object = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise CorpusError(f"{place}: not JSON ({_one_line(error)}); fix or remove the line") from None
            if not isinstance(row, dict):
                raise CorpusError(
                    f'{place}: not a JSON object; write each document as {{"{column}": "…"}} on its own line'
                )
            yield _text_of(cast("dict[str, object]", row), column, place)


class _Table(Protocol):
    """What is used of ``pyarrow.parquet.ParquetFile``, which carries no types."""

    schema_arrow: Iterable["_Field"]

    def iter_batches(self, batch_size: int, columns: list[str]) -> Iterable["_Batch"]: ...
    def close(self) -> None: ...


class _Field(Protocol):
    name: str
    type: object


class _Batch(Protocol):
    def column(self, i: int, /) -> "_Values": ...


class _Values(Protocol):
    def to_pylist(self) -> list[str | None]: ...


def _parquet_documents(file: Path, column: str) -> Iterator[str]:
    # Imported here, as it is slow and most corpora do not need it.
    import pyarrow as pa  # pyright: ignore[reportMissingTypeStubs]
    import pyarrow.parquet as pq  # pyright: ignore[reportMissingTypeStubs]

    arrow_error = cast("type[Exception]", pa.ArrowException)  # pyright: ignore[reportUnknownMemberType]
    n_rows = 0
    try:
        with closing(cast("_Table", pq.ParquetFile(file))) as table:
            types = {field.name: str(field.type) for field in table.schema_arrow}
            if column not in types:
                raise _no_column(str(file), column, types)
            # Strings may be dictionary-encoded by Arrow.
            values = types[column].removeprefix("dictionary<values=")
            if not values.startswith(("string", "large_string")):
                raise _no_text(str(file), column, types[column])
            for batch in table.iter_batches(batch_size=_ROWS, columns=[column]):
                for text in batch.column(0).to_pylist():
                    yield text or ""
                    n_rows += 1
    except UnicodeDecodeError:
        raise CorpusError(
            f"{file}: column {column!r} holds bytes that are not UTF-8, within {_ROWS} rows after "
            f"row {n_rows:,}; repair the file or leave it out"
        ) from None
    except arrow_error as error:
        raise CorpusError(
            f"{file}: not a valid Parquet file ({_one_line(error)}); download it again or leave it out"
        ) from error


# The Hub


class _Builder(Protocol):
    """What is used of ``datasets.DatasetBuilder``, which carries no types."""

    config: "_Config"

    def as_streaming_dataset(self, split: str) -> Iterable[Mapping[str, object]]: ...


class _Config(Protocol):
    data_files: Mapping[str, list[str]] | None


def _hub_corpus(dataset: str, split: str, column: str, config: str | None, revision: str | None) -> Corpus:
    # Imported here: this takes two seconds and other corpora do not need it.
    from datasets import (  # pyright: ignore[reportMissingTypeStubs]
        load_dataset_builder,  # pyright: ignore[reportUnknownVariableType]
    )
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(dataset, revision=revision)
        if info.gated:
            HfApi().auth_check(info.id, repo_type="dataset")
    except Exception as error:
        raise _hub_error(error, dataset, revision) from error
    if "/" not in info.id:  # such as json, which datasets takes for a format of its own
        raise CorpusError(f"dataset {dataset}: a Hub id has the form owner/name")
    try:
        builder = cast("_Builder", load_dataset_builder(info.id, config, revision=info.sha))
        _check_origin(builder.config.data_files or {}, info.id, info.sha)
        rows = builder.as_streaming_dataset(split)
    except CorpusError:
        raise
    except Exception as error:
        raise _hub_error(error, dataset, revision) from error
    return Corpus(info.id, info.sha, split, column, lambda: _hub_documents(rows, info.id, column))


def _check_origin(data_files: Mapping[str, list[str]], dataset: str, sha: str | None) -> None:
    """Refuse text that is not in the commit that the manifest will record.

    A card may refer to files elsewhere, and when the Hub fails, datasets may fall back on an older
    copy in its cache, which lists none.
    """
    files = [file for part in data_files.values() for file in part]
    if not files or not all(f"hf://datasets/{dataset}@{sha}/" in file for file in files):
        raise CorpusError(
            f"dataset {dataset}: its text is not (all) in files of commit {sha}; "
            "download it and give the local files"
        )


def _hub_documents(rows: Iterable[Mapping[str, object]], dataset: str, column: str) -> Iterator[str]:
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            yield _text_of(row, column, f"dataset {dataset}, document {number:,}")
    except CorpusError:
        raise
    except Exception as error:  # a library's error on remote or hostile files may be of any type
        raise CorpusError(
            f"dataset {dataset}: reading failed after document {number:,} "
            f"({type(error).__name__}: {_one_line(error)}); run again, or use local files"
        ) from error


def _hub_error(error: Exception, dataset: str, revision: str | None) -> CorpusError:
    """Translate a failure to open ``dataset`` into a message."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    match error:
        case OfflineModeIsEnabled():
            problem = "not requested, as HF_HUB_OFFLINE is set; unset it, or use local files"
        case GatedRepoError():
            problem = (
                f"gated; ask for access at https://huggingface.co/datasets/{dataset} "
                "and log in with `hf auth login`"
            )
        case RepositoryNotFoundError():
            problem = (
                "not on the Hub, or private; check the name (a local path begins with ./), "
                "or log in with `hf auth login`"
            )
        case RevisionNotFoundError():
            problem = f"has no revision {revision}; give one of its branches, tags or commits"
        case HFValidationError():
            problem = "neither a file or folder here nor a Hub id (owner/name); check the name"
        case ValueError():  # an unknown config or split; the message lists the existing ones
            message = str(error).partition("Example of usage")[0]
            problem = f"{_one_line(message)}; choose another config or split"
        case _:
            problem = (
                f"cannot be opened ({type(error).__name__}: {_one_line(error)}); check the network, "
                "or use local files"
            )
    return CorpusError(f"dataset {dataset}: {problem}")


# Shared by all kinds


def _text_of(row: Mapping[str, object], column: str, place: str) -> str:
    if column not in row:
        raise _no_column(place, column, row)
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise _no_text(place, column, type(text).__name__)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can write half of a UTF-16 pair: "\ud800"
        raise CorpusError(
            f"{place}: character {error.start:,} is half of a UTF-16 pair, so this is not text; "
            "fix or remove the document"
        ) from None
    return text


def _no_column(place: str, column: str, columns: Iterable[str]) -> CorpusError:
    return CorpusError(f"{place}: no column {column!r}; choose another with --column: {_shown(columns)}")


def _no_text(place: str, column: str, kind: str) -> CorpusError:
    return CorpusError(f"{place}: column {column!r} holds {kind}, not text; choose another with --column")


def _shown(names: Iterable[str]) -> str:
    """The first names, quoted as they may be hostile, separated by commas."""
    shown = [repr(name) for name in islice(names, _NAMES_SHOWN + 1)]
    return ", ".join([*shown[:_NAMES_SHOWN], *["…"] * (len(shown) > _NAMES_SHOWN)])


def _one_line(error: object) -> str:
    line = " ".join(str(error).split())
    return line if len(line) <= 500 else f"{line[:500]}…"
