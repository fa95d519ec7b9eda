"""What `make cluster` installs: other people's stores, against ours."""

from __future__ import annotations

from importlib.util import find_spec

# `make test` has none of them, and `make cluster` fails if it finds no test.
_NEEDED = ("moto", "s3fs")
collect_ignore_glob = [] if all(map(find_spec, _NEEDED)) else ["test_store_on_s3.py"]
