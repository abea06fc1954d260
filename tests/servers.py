"""Servers for tests: nginx, OpenSSH, moto for S3, and the fakes of the hub and of Google's storage.

Each starts once a session and stays on this machine. ``server`` is one of them, made ready for a test:
its URL, its files, and the environment (also of child processes) in which posae finds its credentials. A
server whose program or package is missing skips its tests; CI has all.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast
from uuid import uuid4

import pytest
from fakes import TOKEN, Files, Hub, HubHandler, StorageHandler, serving

KINDS = ("http", "s3", "gs", "sftp", "hf")
WRITABLE = ("s3", "gs", "sftp", "hf")


@dataclass(frozen=True)
class Server:
    """A folder on a server that no other test uses.

    Attributes:
        kind: one of ``KINDS``.
        base: the URL of the folder.
        put: put a file there, not by posae.
        files: all files there, not by posae.
    """

    kind: str
    base: str
    put: Callable[[str, bytes], None]
    files: Callable[[], dict[str, bytes]]

    def url(self, path: str = "") -> str:
        """The URL of a folder within."""
        return f"{self.base}/{path}".rstrip("/")

    def fill(self, files: Mapping[str, bytes] | Path, under: str = "") -> str:
        """Put files, or all of a local folder, under a folder within; its URL."""
        found = files_of(files) if isinstance(files, Path) else files
        for path, data in found.items():
            self.put(f"{under}/{path}".lstrip("/"), data)
        return self.url(under)


class StartServer(Protocol):
    """The fixture ``start_server``: a server by its kind."""

    def __call__(self, kind: str) -> Server: ...


def files_of(root: Path) -> dict[str, bytes]:
    """All files of a local folder."""
    return {
        file.relative_to(root).as_posix(): file.read_bytes()
        for file in sorted(root.rglob("*"))
        if file.is_file()
    }


def local(kind: str, base: str, root: Path) -> Server:
    """A server that shows a folder of this machine."""

    def put(path: str, data: bytes) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)

    root.mkdir(parents=True, exist_ok=True)
    return Server(kind, base, put, lambda: files_of(root))


def in_dict(kind: str, base: str, files: Files, prefix: str) -> Server:
    """A server whose files are a dict of this process."""

    def put(path: str, data: bytes) -> None:
        files[prefix + path] = data

    return Server(
        kind,
        base,
        put,
        lambda: {n.removeprefix(prefix): d for n, d in files.items() if n.startswith(prefix)},
    )


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def program(name: str) -> str:
    """The path of a program; daemons are not in everybody's PATH."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/lib/openssh")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@contextmanager
def running(words: list[str], port: int) -> Generator[None]:
    """A program, from when its port answers; stopped in the end."""
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            for _ in range(500):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                if process.poll() is not None:
                    assert process.stderr
                    raise RuntimeError(process.stderr.read().decode())
                time.sleep(0.02)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=10)


NGINX = """
daemon off; master_process off; pid {root}/pid; error_log {root}/errors;
events {{ worker_connections 128; }}
http {{
    access_log off; default_type application/octet-stream;
    client_body_temp_path {root}/t1; proxy_temp_path {root}/t2; fastcgi_temp_path {root}/t3;
    uwsgi_temp_path {root}/t4; scgi_temp_path {root}/t5;
    server {{
        listen 127.0.0.1:{port};
        root {root}/files;
        location /locked/ {{
            auth_basic x; auth_basic_user_file {root}/passwords; rewrite ^/locked/(.*)$ /$1 break;
        }}
        location /forbidden/ {{ return 403; }}
        location /moved/ {{ rewrite ^/moved/(.*)$ /$1 redirect; }}
        location /circle/ {{ rewrite ^ /circle/again redirect; }}
        location /elsewhere/ {{ return 302 http://me:secret@127.0.0.2:{port}$request_uri; }}
        location /whole/ {{ max_ranges 0; rewrite ^/whole/(.*)$ /$1 break; }}
    }}
}}
"""


@pytest.fixture(scope="session")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Generator[tuple[str, Path]]:
    """nginx: its URL, and the folder that it shows.

    Also below ``/locked/`` (user ``me``, password ``secret``), ``/moved/`` (a redirect to the same host),
    ``/whole/`` (no ranges); ``/forbidden/``, ``/circle/``, ``/elsewhere/`` say what they are.
    """
    path, root, port = program("nginx"), tmp_path_factory.mktemp("nginx"), free_port()
    (root / "files").mkdir()
    (root / "passwords").write_text("me:{PLAIN}secret\n")
    (root / "nginx.conf").write_text(NGINX.format(root=root, port=port))
    with running([path, "-c", str(root / "nginx.conf"), "-p", str(root), "-e", str(root / "errors")], port):
        yield f"http://127.0.0.1:{port}", root / "files"


SSHD = """
ListenAddress 127.0.0.1:{port}
HostKey {root}/host
AuthorizedKeysFile {root}/key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
Subsystem sftp internal-sftp
"""


@dataclass(frozen=True)
class Sshd:
    """OpenSSH's server, and a home folder whose ``.ssh`` lets its owner in as ``ssh posae-test`` would."""

    port: int
    root: Path
    home: Path


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Generator[Sshd]:
    """OpenSSH's sshd, run by this user."""
    pytest.importorskip("paramiko")
    path, root, port = program("sshd"), tmp_path_factory.mktemp("sshd"), free_port()
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where it wants to be root's, empty, and there
    for name in ("host", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", root / name], check=True)
    home = root / "home"
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    host_key = " ".join((root / "host.pub").read_text().split()[:2])
    (home / ".ssh/known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}\n")
    (home / ".ssh/config").write_text(
        f"Host posae-test\n  HostName 127.0.0.1\n  Port {port}\n  IdentityFile {root}/key\n"
    )
    (root / "sshd_config").write_text(SSHD.format(root=root, port=port))
    with running([path, "-D", "-e", "-f", str(root / "sshd_config")], port):
        yield Sshd(port, root, home)


@pytest.fixture(scope="session")
def moto() -> Generator[str]:
    """S3 by moto: its URL. It has the bucket ``bucket``."""
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("moto")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    client = moto_client(boto3, url)
    client.create_bucket(Bucket="bucket")
    client.close()
    yield url
    server.stop()


def moto_client(boto3: Any, url: str) -> Any:
    keys = {"aws_access_key_id": "made", "aws_secret_access_key": "up", "region_name": "us-east-1"}
    return boto3.client("s3", endpoint_url=url, **keys)


@pytest.fixture(scope="session")
def fake_storage() -> Generator[tuple[str, dict[str, Files]]]:
    """The fake of Google's storage: its URL, and its buckets."""
    pytest.importorskip("google.auth")
    buckets: dict[str, Files] = {"bucket": {}}
    with serving(StorageHandler, buckets) as url:
        yield url, buckets


@pytest.fixture(scope="session")
def fake_hub() -> Generator[tuple[str, Hub]]:
    """The fake of the hub: its URL, and its datasets."""
    hub = Hub()
    with serving(HubHandler, hub) as url:
        yield url, hub


@pytest.fixture
def start_server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> StartServer:
    """A server by its kind, ready to be used."""

    def setenv(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    def start(kind: str) -> Server:
        name = f"test-{uuid4().hex[:12]}"
        match kind:
            case "http":
                url, root = request.getfixturevalue("nginx")
                return local(kind, f"{url}/{name}", root / name)
            case "sftp":
                server: Sshd = request.getfixturevalue("sshd")
                setenv(HOME=str(server.home))
                monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
                return local(kind, f"sftp://posae-test{server.root}/{name}", server.root / name)
            case "s3":
                url = request.getfixturevalue("moto")
                setenv(AWS_ENDPOINT_URL=url, AWS_ACCESS_KEY_ID="made", AWS_SECRET_ACCESS_KEY="up")
                setenv(AWS_DEFAULT_REGION="us-east-1", AWS_EC2_METADATA_DISABLED="true")
                return in_moto(f"s3://bucket/{name}", url, f"{name}/", request)
            case "gs":
                url, buckets = request.getfixturevalue("fake_storage")
                setenv(STORAGE_EMULATOR_HOST=url)
                return in_dict(kind, f"gs://bucket/{name}", buckets["bucket"], f"{name}/")
            case "hf":
                url, hub = request.getfixturevalue("fake_hub")
                setenv(HF_ENDPOINT=url, HF_TOKEN=TOKEN, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1")
                # It has read its environment when it was imported.
                monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
                monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
                monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
                return in_hub(f"hf://datasets/team/{name}", hub, f"team/{name}")
            case _:
                raise ValueError(kind)

    return start


def in_moto(base: str, url: str, prefix: str, request: pytest.FixtureRequest) -> Server:
    import boto3

    client = moto_client(boto3, url)
    request.addfinalizer(client.close)

    def put(path: str, data: bytes) -> None:
        client.put_object(Bucket="bucket", Key=prefix + path, Body=data)

    def files() -> dict[str, bytes]:
        listed = client.list_objects_v2(Bucket="bucket", Prefix=prefix).get("Contents", ())
        return {
            each["Key"].removeprefix(prefix): client.get_object(Bucket="bucket", Key=each["Key"])[
                "Body"
            ].read()
            for each in listed
        }

    return Server("s3", base, put, files)


def in_hub(base: str, hub: Hub, dataset: str) -> Server:
    def files() -> dict[str, bytes]:
        commits = hub.datasets.get(dataset)
        return {n: d for n, d in commits[-1][1].items() if n != ".gitattributes"} if commits else {}

    return Server("hf", base, lambda path, data: cast(None, hub.commit(dataset, {path: data})), files)


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest, start_server: StartServer) -> Server:
    """Each kind of server."""
    return start_server(request.param)


@pytest.fixture(params=WRITABLE)
def writable_server(request: pytest.FixtureRequest, start_server: StartServer) -> Server:
    """Each kind of server that takes files."""
    return start_server(request.param)
