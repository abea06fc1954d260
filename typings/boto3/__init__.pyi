# The part of boto3 that posae uses; clients are made from AWS's descriptions at run time.
from typing import Any

from botocore.config import Config

class Session:
    def get_credentials(self) -> Any | None: ...
    def client(self, service_name: str, *, config: Config | None = ...) -> Any: ...
