"""A store by its URL: the one place that knows which kinds there are."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from statics.store import FolderStore, Store


def open_store(url: str) -> Store:
    """The store at `s3://bucket/prefix`, `file:///folder` or a plain path."""
    parts = urlsplit(url)
    if parts.scheme == "s3" and parts.netloc:
        from statics.s3 import S3Store  # boto3 takes half a second to import, and folders do not need it

        return S3Store(parts.netloc, parts.path.strip("/"))
    if parts.scheme == "file" and parts.netloc in {"", "localhost"}:
        return FolderStore(Path(unquote(parts.path)))
    if "://" in url or not url:
        raise ValueError(f"store {url!r}: expected s3://bucket/prefix, file:///folder or a path")
    return FolderStore(Path(url))
