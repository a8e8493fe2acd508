"""An S3 server on this machine, for tests of remote paths."""

from __future__ import annotations

import logging
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from pyarrow import fs

BUCKET = "bucket"


class ObjectStore:
    """A bucket of the server at ``endpoint``, named by ``s3://bucket``."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.files = fs.S3FileSystem(
            access_key="key",
            secret_key="secret",
            region="us-east-1",
            endpoint_override=endpoint,
            allow_bucket_creation=True,
        )

    def put(self, key: str, data: bytes) -> str:
        """Writes an object that only its owner may read, and returns its URL."""
        path, metadata = f"{BUCKET}/{key}", {"ACL": "private"}
        with self.files.open_output_stream(path, compression=None, metadata=metadata) as stream:
            stream.write(data)
        return f"s3://{BUCKET}/{key}"

    def get(self, key: str) -> bytes:
        with self.files.open_input_stream(f"{BUCKET}/{key}", compression=None) as stream:
            return stream.read()

    def delete(self, key: str) -> None:
        self.files.delete_file(f"{BUCKET}/{key}")

    def keys(self, prefix: str = "") -> list[str]:
        """The keys of all objects below ``prefix``."""
        found = self.files.get_file_info(fs.FileSelector(f"{BUCKET}/{prefix}".rstrip("/"), recursive=True))
        return sorted(info.path.removeprefix(f"{BUCKET}/") for info in found if info.is_file)

    @contextmanager
    def checking_credentials(self) -> Iterator[None]:
        """The server rejects requests of keys that it does not know, which are all keys."""
        self.command("reset-auth", b"0")
        try:
            yield
        finally:
            self.command("reset-auth", b"inf")

    def command(self, name: str, data: bytes = b"") -> None:
        """Sends a command to the server itself."""
        headers = {"Content-Type": "text/plain"}
        request = urllib.request.Request(f"{self.endpoint}/moto-api/{name}", data, headers, method="POST")
        urllib.request.urlopen(request).close()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of a server."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def object_store(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """An empty bucket; the environment leads to it."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    store = ObjectStore(s3_server)
    store.command("reset")
    store.files.create_dir(BUCKET)
    return store
