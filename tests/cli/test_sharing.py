"""Stores passed from hand to hand by the real commands, over real servers."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from servers import Server, StartServer

from posae.store import ActivationStore

from ..conftest import MakeStore, tree
from .conftest import Posae, call

QUICK = ("--steps", "30", "--batch-size", "64", "--window-contexts", "8", "--log-steps", "10")
CARD = "README.md"


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stores") / "demo.zarr"
    assert call("harvest", path, "--contexts", "40", "--context-length", "16") == 0
    return path


@pytest.fixture(scope="session")
def trained(store: Path) -> Path:
    run = store.parent / "run"
    assert call("train", store, run, *QUICK) == 0
    return run


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POSAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("POSAE_CACHE_SIZE", raising=False)
    return tmp_path / "cache"


def test_a_store_goes_to_a_server_and_comes_back(
    posae: Posae, store: Path, writable_server: Server, tmp_path: Path
) -> None:
    url = writable_server.url("demo.zarr")
    sent = posae("copy", store, url)
    assert sent.code == 0, sent.err
    assert "sealed as" in sent.out
    identity = str(ActivationStore.open(store).identity)
    there = {path.removeprefix("demo.zarr/"): data for path, data in writable_server.files().items()}
    assert {path: data for path, data in there.items() if path in tree(store)} == tree(store)
    again = posae("copy", store, url)
    assert (again.code, "already there" in again.out) == (0, True)
    back = posae("copy", url, tmp_path / "back.zarr")
    assert back.code == 0, back.err
    assert tree(tmp_path / "back.zarr") == tree(store)
    shown = posae("inspect-store", url, "--verify", "--json")
    assert shown.code == 0, shown.err
    facts = json.loads(shown.out)
    assert (facts["identity"], facts["verified"], facts["damaged"]) == (identity, True, [])


def test_training_from_a_server_gives_the_same_weights_and_goes_on_from_a_copy(
    posae: Posae, store: Path, trained: Path, server: Server, tmp_path: Path, own_cache: Path
) -> None:
    url = server.fill(store, "demo.zarr")
    other = tmp_path / "other-cache"
    ended = posae("train", url, tmp_path / "run", *QUICK, "--cache", other, "--cache-size", "5MB")
    assert ended.code == 0, ended.err
    weights = "sae_weights.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (trained / weights).read_bytes()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["store"]["path"] == url
    scores = [json.loads((run / "evaluation.json").read_text()) for run in (tmp_path / "run", trained)]
    assert scores[0]["fvu"] == scores[1]["fvu"]
    assert tree(other)
    assert not own_cache.exists()
    assert posae("train", store, tmp_path / "run", *QUICK).code == 0
    assert posae("evaluate", tmp_path / "run").code == 0


def test_a_part_is_a_whole_store_that_names_its_origin(
    posae: Posae, store: Path, trained: Path, server: Server, tmp_path: Path
) -> None:
    url = server.fill(store, "demo.zarr")
    part = tmp_path / "part.zarr"
    ended = posae("copy", url, part, "--layers", 2)
    assert ended.code == 0, ended.err
    assert posae("copy", url, part, "--layers", 2).out.startswith(f"{part}: already there")
    found = ActivationStore.open(part)
    assert found.layers == (2,)
    assert found.manifest.origin is not None
    assert set(found.manifest.origin.stores) == {ActivationStore.open(store).identity}
    assert (found.read(2) == ActivationStore.open(store).read(2)).all()
    assert posae("inspect-store", part, "--verify").code == 0
    assert posae("train", part, trained, *QUICK).code == 0, "a run goes on from a part with its layer"
    some = posae("copy", url, tmp_path / "some.zarr", "--contexts", "3:21", "--codec", "fast")
    assert some.code == 0, some.err
    again = ActivationStore.open(tmp_path / "some.zarr")
    assert (again.read(1) == ActivationStore.open(store).read(1, slice(3, 21))).all()


def test_a_part_goes_to_a_server(
    posae: Posae, store: Path, start_server: StartServer, own_cache: Path
) -> None:
    server = start_server("s3")
    url = server.url("part.zarr")
    ended = posae("copy", store, url, "--fraction", "0.5", "--codec", "raw")
    assert ended.code == 0, ended.err
    found = ActivationStore.open(url)
    assert found.manifest.codec == "raw"
    assert " 0 B" not in ended.out
    assert not list((own_cache / "staging").iterdir())


def test_a_part_that_is_refused_leaves_nothing_here_and_one_that_may_be_sent_later_stays(
    posae: Posae, store: Path, start_server: StartServer, own_cache: Path
) -> None:
    server = start_server("s3")
    server.put("other/notes.txt", b"of somebody else")
    refused = posae("copy", store, server.url("other"), "--layers", "2")
    assert (refused.code, "holds no store" in refused.err) == (1, True)
    assert not list((own_cache / "staging").iterdir())
    failed = posae("copy", store, "s3://no-such-bucket/part.zarr", "--layers", "2")
    (staged,) = (own_cache / "staging").iterdir()
    assert failed.code == 1
    assert f"the part to send waits in {staged}: run the same command again, or remove it" in failed.err
    assert ActivationStore.open(staged).is_sealed


def test_verifying_a_store_of_links_says_how_to_get_the_files(
    posae: Posae, store: Path, tmp_path: Path
) -> None:
    for file in tree(store):
        (tmp_path / "linked" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "linked" / file).symlink_to(store / file)
    ended = posae("inspect-store", tmp_path / "linked", "--verify")
    assert ended.code == 1
    assert f"in {tmp_path / 'linked'} it is a link" in ended.err
    assert "hf download --local-dir" in ended.err
    assert "damaged" not in ended.out + ended.err


def test_a_store_is_copied_from_a_server_that_sends_whole_files_only(
    posae: Posae, make_store: MakeStore, start_server: StartServer, tmp_path: Path
) -> None:
    root = tmp_path / "wide.zarr"
    made = make_store(root, d_model=512, context_length=32, n_contexts=136, shard_contexts=128)
    base, _, name = (
        start_server("http").fill(made.root, "wide.zarr").removesuffix("/wide.zarr").rpartition("/")
    )
    url = f"{base}/whole/{name}/wide.zarr"
    copied = posae("copy", url, tmp_path / "copy.zarr")
    assert copied.code == 0, copied.err
    assert {path: data for path, data in tree(tmp_path / "copy.zarr").items() if path != CARD} == tree(
        made.root
    )
    trained = posae("train", url, tmp_path / "run", *QUICK)
    assert trained.code == 1
    assert "sends whole files only; copy the store from it: posae copy" in trained.err


def test_a_cache_in_a_folder_of_the_users_keeps_what_was_there(
    posae: Posae, store: Path, start_server: StartServer, tmp_path: Path
) -> None:
    url = start_server("http").fill(store, "demo.zarr")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with (scratch / "activations.bin").open("wb") as file:
        file.truncate(60 * 10**9)
    ended = posae("train", url, tmp_path / "run", *QUICK, "--cache", scratch, "--cache-size", "1MB")
    assert ended.code == 0, ended.err
    assert (scratch / "activations.bin").stat().st_size == 60 * 10**9


def test_a_copy_that_was_killed_goes_on(store: Path, start_server: StartServer, tmp_path: Path) -> None:
    server = start_server("http")
    url, target = server.fill(store, "demo.zarr"), tmp_path / "copy.zarr"
    words = [sys.executable, "-m", "posae", "copy", url, str(target)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(target.rglob("c.*"))) < 12:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (target / "seal.json").exists()
    refused = subprocess.run(
        [*words[:3], "inspect-store", target], capture_output=True, text=True, check=False
    )
    assert (refused.returncode, refused.stderr.count("error: ")) == (1, 1)
    assert "run the same posae copy again" in " ".join(refused.stderr.split())
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert tree(target) == tree(store)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("copy", "STORE", "STORE"), "is the store to copy from; choose another destination"),
        (("copy", "STORE", "OUT", "--contexts", "0:4000"), "has 0:40; choose a part of them"),
        (("copy", "STORE", "OUT", "--contexts", "0:8", "--fraction", "0.5"), "contradict each other"),
        (("copy", "STORE", "OUT", "--layers", "9"), "has no layer 9; it has 1, 2, 4"),
        (("copy", "STORE", "https://localhost:1/pile.zarr"), "cannot be written"),
        (("train", "STORE", "OUT", "--cache-size", "much"), "write it as 50GB"),
        (
            ("train", "ftp://host/pile.zarr", "OUT"),
            "ftp://host/pile.zarr: posae cannot open this kind of URL; use one of http://",
        ),
        (
            ("harvest", "s3://bucket/x.zarr"),
            "s3://bucket/x.zarr is a URL, but this command writes to a local folder",
        ),
        (("train", "STORE", "hf://datasets/a/b"), "hf://datasets/a/b is a URL"),
        (("report", "OUT", "--out", "gs://bucket/x.html"), "gs://bucket/x.html is a URL"),
        (("train", "STORE", "WITHIN"), "demo.zarr; choose a folder outside of it"),
        (("copy", "STORE", "WITHIN"), "demo.zarr; choose a folder outside of it"),
        (("copy", "STORE", "s3:/bucket/x.zarr"), "s3:/bucket/x.zarr lacks a slash; write s3://bucket/x.zarr"),
        (("train", "gs:/bucket/x.zarr", "OUT"), "gs:/bucket/x.zarr lacks a slash; write gs://bucket/x.zarr"),
        (("copy", "STORE", "sftp://host/x"), "copy the folder with rsync -a, or mount it with sshfs"),
        (
            ("copy", "STORE", "nope://b/x", "--fraction", "0.5"),
            "nope://b/x: posae cannot open this kind of URL; use one of http://",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_copied_or_written_is_told(
    words: tuple[str, ...], said: str, posae: Posae, store: Path, tmp_path: Path
) -> None:
    places = {"STORE": str(store), "WITHIN": str(store / "run"), "OUT": str(tmp_path / "out")}
    before = tree(store)
    ended = posae(*(places.get(word, word) for word in words))
    assert ended.code == 1
    assert said in ended.err
    assert tree(store) == before


def test_what_is_beside_a_store_is_not_within_it(posae: Posae, store: Path, tmp_path: Path) -> None:
    group = tmp_path / "group"
    group.mkdir()
    (group / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    shutil.copytree(store, group / "a.zarr")
    assert posae("train", store, group / "a.zarr" / ".." / "run", *QUICK).code == 0
    assert (group / "run" / "evaluation.json").exists()


def test_an_unfinished_store_is_neither_copied_nor_opened_from_a_server(
    posae: Posae, make_store: MakeStore, start_server: StartServer, tmp_path: Path
) -> None:
    made = make_store(tmp_path / "unfinished.zarr", seal=False)
    url = start_server("http").fill(made.root, "unfinished.zarr")
    for source in (made.root, url):
        ended = posae("copy", source, tmp_path / "copy.zarr")
        assert ended.code == 1
        assert "unfinished" in ended.err
    assert not (tmp_path / "copy.zarr").exists()


def test_credentials_stay_out_of_all_that_is_kept_and_said(
    posae: Posae, store: Path, start_server: StartServer, tmp_path: Path, own_cache: Path
) -> None:
    server = start_server("http")
    base = server.fill(store, "demo.zarr").replace("://", "://me:hunter2@")
    url = f"{base}?token=hunter2"
    run = tmp_path / "run"
    said = [posae("train", url, run, *QUICK), posae("inspect-store", url), posae("copy", url, tmp_path / "c")]
    said.append(posae("train", f"{base}/none?token=hunter2", tmp_path / "none", *QUICK))
    assert [ended.code for ended in said] == [0, 0, 0, 1]
    assert not any("hunter2" in ended.out + ended.err for ended in said)
    kept = {**tree(run), **tree(own_cache), **tree(tmp_path / "c")}
    assert not any(b"hunter2" in data or "hunter2" in path for path, data in kept.items())
