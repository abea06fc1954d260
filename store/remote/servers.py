"""A URL to the folder that it names; each kind of server is imported only when it is asked for."""

from ..errors import SettingsError
from .folder import SCHEMES, RemoteFolder, is_url, shown


def open_remote(url: str) -> RemoteFolder:
    """The folder on a server; nothing is asked of the server yet.

    Args:
        url: ``http(s)://``, ``s3://``, ``gs://``, ``sftp://`` or ``hf://``; see docs/sharing.md.

    Raises:
        SettingsError: another scheme, a URL that its scheme does not allow, or a package is missing.
        StoreRemoteError: the configuration of the service's library forbids or breaks it.
    """
    if not is_url(url):
        raise SettingsError(f"{shown(url)} is no URL of {', '.join(f'{name}://' for name in SCHEMES)}")
    scheme = url.partition("://")[0].lower()
    try:
        match scheme:
            case "s3":
                from .s3 import S3Folder as Folder
            case "gs":
                from .gs import GsFolder as Folder
            case "sftp":
                from .sftp import SftpFolder as Folder
            case "hf":
                from .hub import HubFolder as Folder
            case _:
                from .http import HttpFolder as Folder
    except ModuleNotFoundError as error:
        extra = SCHEMES[scheme]
        if extra is None:
            raise
        raise SettingsError(
            f"{scheme}:// needs the package {error.name}; run: pip install 'posae[{extra}]'"
        ) from None
    return Folder(url)
