"""A URL to the folder that it names; what a kind of server needs is imported only when it is asked for."""

from ..errors import SettingsError
from .folder import SCHEMES, RemoteFolder, shown


def open_remote(url: str) -> RemoteFolder:
    """The folder on a server; nothing is asked of the server yet.

    Args:
        url: ``http(s)://``, ``hf://``, ``s3://``, ``gs://`` or ``az://``; see docs/sharing.md.

    Raises:
        SettingsError: another scheme, or a URL that its scheme does not allow.
        StoreRemoteError: the environment forbids it.
    """
    scheme = url.partition("://")[0].lower()
    if scheme in ("sftp", "ssh"):
        raise SettingsError(
            f"{shown(url)}: posae does not use SSH; copy the folder with rsync -a, or mount it with sshfs; "
            "see docs/sharing.md"
        )
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise SettingsError(f"{shown(url)}: posae cannot open this kind of URL; use one of {known}")
    if scheme == "hf":
        from .hub import HubFolder

        return HubFolder(url)
    from .objects import BucketFolder, WebFolder

    return WebFolder(url) if scheme in ("http", "https") else BucketFolder(url)
