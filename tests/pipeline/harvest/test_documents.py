"""Documents of every kind, in order and lazily; each thing that can be wrong told in one line."""

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs

import pytest
from huggingface_hub import close_session
from huggingface_hub.utils import httpx as untyped_httpx

from posae.pipeline.errors import CorpusError
from posae.pipeline.harvest.text.documents import Corpus, open_corpus
from posae.pipeline.harvest.text.stdlib import stdlib_revision
from posae.store.errors import SettingsError

httpx = cast(Any, untyped_httpx)


def told(error: type[Exception], call: Callable[[], object]) -> str:
    """The message that ``call`` fails with, which is one line."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def texts(dataset: object, **settings: Any) -> list[str]:
    return list(open_corpus(str(dataset), **settings).documents())


def write_parquet(file: Path, columns: dict[str, Any]) -> Path:
    import pyarrow as pa  # pyright: ignore[reportMissingTypeStubs]
    import pyarrow.parquet as pq  # pyright: ignore[reportMissingTypeStubs]

    cast(Any, pq).write_table(cast(Any, pa).table(columns), file, row_group_size=100)
    return file


def write_lines(file: Path, *rows: object) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


# The standard library


def test_stdlib() -> None:
    corpus = open_corpus("stdlib")
    assert corpus[:4] == ("stdlib", stdlib_revision(), "all", None)
    held_out = open_corpus("stdlib", split="held_out", revision=stdlib_revision())
    assert held_out.split == "held_out"
    assert list(held_out.documents()) == list(held_out.documents())
    assert len(next(corpus.documents())) >= 200
    assert told(CorpusError, lambda: open_corpus("stdlib", split="test")) == (
        "stdlib has no split 'test'; it has train, held_out, all"
    )
    assert told(CorpusError, lambda: open_corpus("stdlib", revision="python-3.0.0-0")) == (
        f"stdlib is at revision {stdlib_revision()}, not python-3.0.0-0; "
        "leave out --dataset-revision, or find that text"
    )


# Local files


def test_text_file_is_one_document(tmp_path: Path) -> None:
    data = "\ufeffåäö\r\nsecond line\n".encode()
    file = tmp_path / "a.txt"
    file.write_bytes(data)
    corpus = open_corpus(str(file))
    digest = hashlib.sha256(data).hexdigest()[:16]
    assert corpus[:4] == ("a.txt", f"sha256:{digest}", None, None)
    assert list(corpus.documents()) == ["åäö\r\nsecond line\n"]  # but for the byte order mark
    assert texts(file, revision=corpus.revision) == texts(file)
    (tmp_path / "b.TXT.gz").write_bytes(gzip.compress(b"packed"))
    assert texts(tmp_path / "b.TXT.gz") == ["packed"]


def test_json_lines(tmp_path: Path) -> None:
    rows = [{"text": "one", "n": 1}, {"text": None}, {"text": "é\n\0"}]
    file = write_lines(tmp_path / "a.jsonl", *rows)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes() + b"\n  \n")
    assert open_corpus(str(file)).column == "text"
    assert texts(file) == ["one", "", "é\n\0"]
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert texts(packed) == texts(file)
    write_lines(tmp_path / "b.jsonl", {"body": "two"})
    assert texts(tmp_path / "b.jsonl", column="body") == ["two"]


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_parquet(tmp_path: Path, kind: str) -> None:
    import pyarrow as untyped_pa  # pyright: ignore[reportMissingTypeStubs]

    pa = cast(Any, untyped_pa)
    written = [f"document {i % 7}" for i in range(1000)]
    column = pa.array([*written, None], pa.large_string() if kind == "large_string" else pa.string())
    column = column.dictionary_encode() if kind == "dictionary" else column
    file = write_parquet(tmp_path / "a.parquet", {"n": list(range(1001)), "text": column})
    assert open_corpus(str(file)).column == "text"
    assert texts(file) == [*written, ""]


def test_folder_is_its_files_in_the_order_of_their_paths(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "b" / "z.txt").write_text("2")
    (folder / "c.txt").write_text("3")
    (folder / ".hidden" / "d.txt").write_text("no")
    (folder / "notes.md").write_text("no")
    (folder / "0.txt").symlink_to(folder / "c.txt")
    corpus = open_corpus(f"{folder}/")
    names = {"0.txt": "3", "b/z.txt": "2", "c.txt": "3"}
    listing = "".join(f"{hashlib.sha256(t.encode()).hexdigest()}  {n}\n" for n, t in names.items())
    digest = hashlib.sha256(listing.encode()).hexdigest()[:16]
    assert corpus[:4] == ("texts", f"sha256:{digest}", None, None)
    assert list(corpus.documents()) == ["3", "2", "3"]
    write_lines(folder / "a.jsonl", {"text": "1"})
    assert open_corpus(str(folder)).column == "text"
    assert texts(folder) == ["3", "1", "2", "3"]


def test_no_path_of_this_machine_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    file = tmp_path / "in" / "a.txt"
    file.write_text("text")
    monkeypatch.chdir(tmp_path / "in")
    monkeypatch.setenv("HOME", str(tmp_path))
    names = [str(file), "a.txt", "./a.txt", "~/in/a.txt"]
    assert {open_corpus(name)[:4] for name in names} == {open_corpus(str(file))[:4]}
    assert [open_corpus(name).id for name in (".", "../in/", "~/in")] == ["in"] * 3
    assert open_corpus("..").id == tmp_path.name


def test_files_are_read_lazily(tmp_path: Path) -> None:
    lines = [json.dumps({"text": str(i)}) for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "broken"]))
    (tmp_path / "b.txt").write_bytes(b"\0")
    corpus = open_corpus(str(tmp_path))
    for _ in range(2):  # and begun anew
        documents = corpus.documents()
        assert [next(documents) for _ in range(3)] == ["0", "1", "2"]


def test_strangers_are_not_unpickled(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert "not one of the supported formats (.txt" in told(
        CorpusError, lambda: open_corpus(str(tmp_path / "a.pkl"))
    )
    assert "no file in this folder" in told(CorpusError, lambda: open_corpus(str(tmp_path)))


def raw(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


BAD_FILES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (
        lambda folder: folder / "none.txt",
        "no such file or folder; check the path (a Hub id has the form owner/name)",
    ),
    "empty folder": (
        lambda folder: folder,
        "no file in this folder ends in .txt, .txt.gz, .jsonl, .jsonl.gz, .parquet",
    ),
    "other kind": (
        raw("a.csv", b"a,b"),
        "not one of the supported formats (.txt, .txt.gz, .jsonl, .jsonl.gz, .parquet); convert it",
    ),
    "device": (lambda _: Path("/dev/null"), "neither a file nor a folder; give one"),
    "name too long": (
        lambda folder: folder / ("x" * 300 + ".txt"),
        "cannot be read (File name too long); check the file and its permissions",
    ),
    "latin-1": (
        raw("a.txt", b"abc\xe9def"),
        "byte 3 is 0xe9, so this is not UTF-8 text; convert the file (iconv -t UTF-8) or leave it out",
    ),
    "UTF-16": (
        raw("a.txt", "x".encode("utf-16-be")),
        "byte 0 is NUL, so this is not UTF-8 text; convert the file (iconv -t UTF-8) or leave it out",
    ),
    "no gzip": (
        raw("a.txt.gz", b"text"),
        "cannot be read (Not a gzipped file (b'te')); check the file and its permissions",
    ),
    "gzip cut off": (
        raw("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n')[:-8]),
        "cannot be read (Compressed file ended before the end-of-stream marker was reached); "
        "check the file and its permissions",
    ),
    "gzip damaged": (
        raw("a.txt.gz", gzip.compress(b"text")[:10] + b"\xff" * 20),
        "cannot be read (Error -3",
    ),
    "no JSON": (
        raw("a.jsonl", b'{"text": "a"}\n{"text": \n'),
        ", line 2: not JSON (Expecting value: line 2 column 1 (char 10)); fix or remove the line",
    ),
    "deep JSON": (
        raw("a.jsonl", b"[" * 100_000),
        ", line 1: not JSON (maximum recursion depth exceeded",
    ),
    "long number": (
        raw("a.jsonl", b"1" * 5000),
        ", line 1: not JSON (Exceeds the limit",
    ),
    "JSON of no object": (
        raw("a.jsonl", b'["a"]\n'),
        ', line 1: not a JSON object; write each document as {"text": "…"} on its own line',
    ),
    "JSON without the column": (
        raw("a.jsonl", b'\n{"body": "a", "\x1b[31m": 1}\n'.replace(b"\x1b", b"\\u001b")),
        ", line 2: no column 'text'; choose another with --column: 'body', '\\x1b[31m'",
    ),
    "JSON of many columns": (
        raw("a.jsonl", json.dumps({f"c{i}": 0 for i in range(1000)}).encode()),
        ", line 1: no column 'text'; choose another with --column: "
        + ", ".join(f"'c{i}'" for i in range(20))
        + ", …",
    ),
    "JSON of a number": (
        raw("a.jsonl", b'{"text": 1}'),
        ", line 1: column 'text' holds int, not text; choose another with --column",
    ),
    "JSON with half a pair": (
        raw("a.jsonl", b'{"text": "ab\\ud800"}'),
        ", line 1: character 2 is half of a UTF-16 pair, so this is not text; fix or remove the document",
    ),
    "binary JSON": (
        raw("a.jsonl", b'{"text": "a"}\n\xff\n'),
        "byte 14 is 0xff, so this is not UTF-8 text; convert the file (iconv -t UTF-8) or leave it out",
    ),
    "no Parquet": (
        raw("a.parquet", b"PAR1" + b"x" * 100),
        "not a valid Parquet file (Parquet magic bytes not found in footer.",
    ),
    "Parquet without the column": (
        lambda folder: write_parquet(folder / "a.parquet", {"body": ["a"], "n": [1]}),
        "no column 'text'; choose another with --column: 'body', 'n'",
    ),
    "Parquet of lists": (
        lambda folder: write_parquet(folder / "a.parquet", {"text": [["a"]]}),
        "column 'text' holds list<element: string>, not text; choose another with --column",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_told(case: str, tmp_path: Path) -> None:
    make, message = BAD_FILES[case]
    file = make(tmp_path)
    said = told(CorpusError, lambda: texts(file))
    assert said.startswith(str(file))
    assert message in said


def test_parquet_of_bytes_that_are_no_text_is_told(tmp_path: Path) -> None:
    import pyarrow as untyped_pa  # pyright: ignore[reportMissingTypeStubs]

    pa = cast(Any, untyped_pa)
    column = pa.array([b"fine", b"\xff"]).view(pa.string())
    file = write_parquet(tmp_path / "a.parquet", {"text": column})
    assert "holds bytes that are not UTF-8, within 256 rows after row 0;" in told(
        CorpusError, lambda: texts(file)
    )


def test_damaged_parquet_is_told(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", {"text": [f"document {i}" for i in range(1000)]})
    data = bytearray(file.read_bytes())
    data[8:200] = b"\xff" * 192
    file.write_bytes(data)
    assert told(CorpusError, lambda: texts(file)).startswith(f"{file}: ")


@pytest.mark.parametrize(
    ("dataset", "settings", "message"),
    [
        ("", {}, "the name of the dataset is empty; give stdlib, a file, a folder or a Hub id"),
        ("{file}", {"split": "train"}, "local files have no splits; leave out --split"),
        ("{file}", {"config": "en"}, "only datasets on the Hub have configs; leave out --dataset-config"),
        ("stdlib", {"config": "en"}, "only datasets on the Hub have configs; leave out --dataset-config"),
    ],
)
def test_settings_that_a_corpus_lacks_are_refused(
    dataset: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("text")
    dataset = dataset.format(file=tmp_path / "a.txt")
    assert message in told(SettingsError, lambda: open_corpus(dataset, **settings))


# The Hub: the real libraries, asking a Hub that answers from this process

SHA = "0123456789" * 4
CARD = """---
configs:
- config_name: small
  data_files:
  - {split: train, path: data/train.jsonl}
  - {split: test, path: data/test.jsonl}
- config_name: %s
  data_files: data/none-*.jsonl
---
"""


class Hub:
    """One dataset, ``owner/name``, at one commit, and what else is asked for refused."""

    def __init__(self, tmp_path: Path) -> None:
        train = [{"text": f"document {i}", "n": i} for i in range(300)]
        self.files = {
            "README.md": (CARD % "none").encode(),
            "data/train.jsonl": write_lines(tmp_path / "train.jsonl", *train).read_bytes(),
            "data/test.jsonl": b'{"text": "t"}',
        }
        self.gated: str | bool = False
        self.is_down = False

    def answer(self, request: Any) -> Any:
        if self.is_down:
            raise httpx.ConnectError("[Errno -2] Name or service not known")
        path = cast("str", request.url.path)
        if path.startswith("/api/datasets/owner/name"):
            return self.answer_about(path.removeprefix("/api/datasets/owner/name"), request)
        if path.startswith("/api/datasets/owner/gated"):
            return self.refuse("GatedRepo", 401)
        file = path.removeprefix(f"/datasets/owner/name/resolve/{SHA}/")
        if file in self.files:
            content = self.files[file]
            if "range" in request.headers:
                start, end = request.headers["range"].removeprefix("bytes=").split("-")
                content = content[int(start) : int(end) + 1]
            return httpx.Response(200, content=content, headers={"ETag": f'"{file}"', "X-Repo-Commit": SHA})
        return self.refuse("EntryNotFound" if "/owner/name/" in path else "RepoNotFound", 404)

    def answer_about(self, what: str, request: Any) -> Any:
        if what in ("", f"/revision/{SHA}", "/revision/v1"):
            facts: dict[str, Any] = {
                "id": "owner/name",
                "sha": SHA,
                "gated": self.gated,
                "tags": [],
                "siblings": [],
            }
            return httpx.Response(200, json=facts)
        if what == "/auth-check":
            return self.refuse("GatedRepo", 403)
        if what.startswith("/tree/"):
            wanted = list(self.files)
        elif what.startswith("/paths-info/"):
            wanted = parse_qs(request.content.decode())["paths"]
        else:
            return self.refuse("RevisionNotFound", 404)
        found = [
            {"type": "file", "path": file, "size": len(self.files[file]), "oid": "0" * 40}
            for file in wanted
            if file in self.files
        ]
        return httpx.Response(200, json=found)

    @staticmethod
    def refuse(code: str, status: int) -> Any:
        return httpx.Response(status, headers={"X-Error-Code": code, "X-Repo-Commit": SHA})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    cache = str(tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", cache)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    monkeypatch.setattr("datasets.config.DOWNLOADED_DATASETS_PATH", cache)
    monkeypatch.setattr("datasets.config.HF_UPDATE_DOWNLOAD_COUNTS", False)  # asks another server
    answering = Hub(tmp_path)
    monkeypatch.setattr(
        "huggingface_hub.utils._http._GLOBAL_CLIENT_FACTORY",
        lambda: httpx.Client(transport=httpx.MockTransport(answering.answer)),
    )
    close_session()  # the next request makes a client anew, here and afterwards
    yield answering
    close_session()


def open_small(**settings: Any) -> Corpus:
    words: dict[str, Any] = {"config": "small"}
    return open_corpus("owner/name", **words | settings)


def test_hub_dataset_is_streamed(hub: Hub) -> None:
    corpus = open_small(revision="v1")
    assert corpus[:4] == ("owner/name", SHA, "train", "text")
    for _ in range(2):
        assert list(corpus.documents()) == [f"document {i}" for i in range(300)]
    test = open_small(split="test")
    assert test.split == "test"
    assert list(test.documents()) == ["t"]


def test_hub_dataset_without_a_card_is_streamed(hub: Hub, tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", {"body": ["one", None, "two"]})
    hub.files = {"train-00000-of-00001.parquet": file.read_bytes()}
    assert texts("owner/name", column="body") == ["one", "", "two"]


def test_hub_errors_are_told(hub: Hub) -> None:
    said = "dataset owner/name: "
    assert told(CorpusError, lambda: open_small(config=None)) == said + (
        "Config name is missing. Please pick one among the available configs: ['small', 'none']; "
        "choose another config or split"
    )
    assert told(CorpusError, lambda: open_small(config="big")) == said + (
        "BuilderConfig 'big' not found. Available: ['small', 'none']; choose another config or split"
    )
    assert told(CorpusError, lambda: open_small(split="valid")) == said + (
        "Bad split: valid. Available splits: ['train', 'test']; choose another config or split"
    )
    assert told(CorpusError, lambda: open_small(revision="v2")) == said + (
        "has no revision v2; give one of its branches, tags or commits"
    )
    assert told(CorpusError, lambda: open_small(config="none")) == said + (
        f"its text is not (all) in files of commit {SHA}; download it and give the local files"
    )
    assert told(CorpusError, lambda: open_corpus("owner/unknown")) == (
        "dataset owner/unknown: not on the Hub, or private; check the name (a local path begins "
        "with ./), or log in with `hf auth login`"
    )
    assert told(CorpusError, lambda: open_corpus("no id")) == (
        "dataset no id: neither a file or folder here nor a Hub id (owner/name); check the name"
    )


def test_hub_documents_that_are_no_text_are_told(hub: Hub) -> None:
    assert told(CorpusError, lambda: next(open_small(column="body").documents())) == (
        "dataset owner/name, document 1: no column 'body'; choose another with --column: 'text', 'n'"
    )
    assert told(CorpusError, lambda: next(open_small(column="n").documents())) == (
        "dataset owner/name, document 1: column 'n' holds int, not text; choose another with --column"
    )
    hub.files["data/train.jsonl"] = b'{"text": "a"}\n{broken\n'
    assert told(CorpusError, lambda: list(open_small().documents())).startswith("dataset owner/name: ")


def test_gated_datasets_are_told(hub: Hub) -> None:
    for hub.gated in ("auto", "manual"):
        assert told(CorpusError, open_small) == (
            "dataset owner/name: gated; ask for access at https://huggingface.co/datasets/owner/name "
            "and log in with `hf auth login`"
        )
    assert "gated" in told(CorpusError, lambda: open_corpus("owner/gated"))


def test_files_elsewhere_are_not_read_for_a_stranger(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    card = CARD.replace("data/none-*.jsonl", str(tmp_path / "secret.txt"))
    hub.files["README.md"] = (card % "evil").encode()
    assert "Data files don't belong to owner/name" in told(CorpusError, lambda: open_small(config="evil"))


def test_code_of_a_dataset_is_not_run(hub: Hub) -> None:
    hub.files["name.py"] = b"raise SystemExit"
    assert told(CorpusError, open_small) == (
        "dataset owner/name: cannot be opened (RuntimeError: Dataset scripts are no longer supported, "
        "but found name.py); check the network, or use local files"
    )


def test_a_hub_out_of_reach_is_told(hub: Hub) -> None:
    hub.is_down = True
    assert told(CorpusError, open_small) == (
        "dataset owner/name: cannot be opened (ConnectError: [Errno -2] Name or service not known); "
        "check the network, or use local files"
    )


def test_offline_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert told(CorpusError, open_small) == (
        "dataset owner/name: not requested, as HF_HUB_OFFLINE is set; unset it, or use local files"
    )
