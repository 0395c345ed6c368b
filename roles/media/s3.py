"""The files of a store as objects of a bucket: any service that speaks S3, through fsspec and s3fs.

Credentials, region and endpoint are those of the AWS tools: environment variables such as `AWS_ACCESS_KEY_ID` and
`AWS_ENDPOINT_URL`, `~/.aws`, or the role of the machine.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, cast

from triptych.roles.media.files import Entry, StoreUnavailableError

if TYPE_CHECKING:
    from s3fs import S3FileSystem

SCHEME: Final = "s3://"
READ_AHEAD: Final = 4 << 20
"""Bytes that one request for a part of an object brings."""
_CONFIG: Final = {"connect_timeout": 5, "read_timeout": 20, "retries": {"mode": "standard", "max_attempts": 2}}
_TRANSIENT: Final = (errno.EBUSY, errno.EREMOTEIO, errno.EIO)
"""As s3fs translates "slow down", a failure within the service, and one that it does not know."""


class S3Files:
    """Objects below a prefix of a bucket. An object appears whole; one that is replaced is never read in part.

    Args:
        url: `s3://BUCKET/PREFIX`.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._prefix = self.url.removeprefix(SCHEME)

    @property
    def location(self) -> str:
        """Return the URL."""
        return self.url

    def prepare(self) -> None:
        """Check that there is such a bucket, and that it can be listed."""
        bucket = self._prefix.partition("/")[0]
        with self._translated():
            try:
                self._s3.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1)
            except FileNotFoundError:
                raise OSError(errno.ENODEV, f"there is no bucket {bucket}") from None

    def path(self, name: str) -> Path | None:
        """Return None: no path leads to an object."""
        return None

    def write(self, name: str, data: bytes) -> None:
        """Write an object, in parts if it is large."""
        with self._translated():
            try:
                self._s3.pipe_file(self._key(name), data)
            except FileNotFoundError:
                raise OSError(errno.ENODEV, f"{self.url}: there is no such bucket") from None

    def read(self, name: str) -> bytes:
        """Read a whole object."""
        with self._translated():
            return cast(bytes, self._s3.cat_file(self._key(name)))

    def open(self, name: str) -> BinaryIO:
        """Open an object. Reading raises an error when it was replaced meanwhile."""
        with self._translated():
            return cast(BinaryIO, self._s3.open(self._key(name), "rb", block_size=READ_AHEAD))

    def stat(self, name: str) -> Entry:
        """Return size and age of an object."""
        with self._translated():
            return _entry(self._s3.info(self._key(name)))

    def entries(self) -> list[Entry]:
        """List all objects."""
        with self._translated():
            try:
                found = self._s3.ls(self._prefix, detail=True, refresh=True)
            except FileNotFoundError:  # none was written yet
                return []
            return [_entry(info) for info in found if info["type"] == "file"]

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects, one by one: an answer to many at once may hide that some are still there."""
        for name in names:
            with self._translated(), suppress(FileNotFoundError):
                self._s3.rm_file(self._key(name))

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    @cached_property
    def _s3(self) -> S3FileSystem:
        # Here, because it is an extra, and its thread must not be made before a process forks.
        from s3fs import S3FileSystem

        return S3FileSystem(skip_instance_cache=True, use_listings_cache=False, config_kwargs=_CONFIG)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn what the libraries raise into what `Files` says."""
        from aiohttp import ClientError
        from botocore.exceptions import BotoCoreError, NoCredentialsError, PartialCredentialsError

        try:
            yield
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise PermissionError(errno.EACCES, f"{self.url}: {error}") from error
        except (BotoCoreError, ClientError, TimeoutError) as error:
            raise StoreUnavailableError(errno.EIO, f"{self.url} does not answer: {error}") from error
        except OSError as error:
            if error.errno in _TRANSIENT:
                raise StoreUnavailableError(error.errno, f"{self.url}: {error}") from error
            raise


def _entry(info: dict[str, Any]) -> Entry:
    return Entry(info["name"].rpartition("/")[2], info["LastModified"].timestamp(), info["size"])
