"""URLs as they may be told: nothing of what is secret in them, however it was written."""

from __future__ import annotations

import pytest

from superpose_adapters.without_secrets import without_secrets


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("/srv/a@b:c?d", "/srv/a@b:c?d"),
        ("file:///srv/adapters/", "file:///srv/adapters"),
        ("s3://bucket/path", "s3://bucket/path"),
        ("hf://datasets/user/name@main/path", "hf://datasets/user/name@main/path"),
        ("sftp://host:22/path", "sftp://host:22/path"),
        ("sftp://user@host/path", "sftp://host/path"),
        ("sftp://user:secret@host:22/path", "sftp://host:22/path"),
        ("s3://key:secret/secret@bucket/path", "s3://bucket/path"),
        ("s3://key:secret@secret@bucket/path?secret=1", "s3://bucket/path"),
        ("https://host/path?signature=secret", "https://host/path"),
        ("https://host/path#secret", "https://host/path"),
        ("https://host/path?mail=me@secret", "https://host/path"),
        ("https://me:secret@host/path?signature=secret#secret", "https://host/path"),
        ("simplecache::https://secret@host/path?secret", "simplecache::https://host/path"),
        # Where the password ends, and where the query begins, nobody can say.
        ("https://host:443/path?mail=secret@secret", "https://..."),
        ("https://me:secret?secret@host/path", "https://..."),
        ("https://me:secret#secret@host/path", "https://..."),
        ("https://secret?secret@host/path", "https://..."),
    ],
)
def test_a_url_is_told_without_its_secrets(url: str, told: str) -> None:
    assert without_secrets(url) == told
