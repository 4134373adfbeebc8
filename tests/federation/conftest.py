"""Fixtures of these tests, which are left out where Flower, an extra, is missing."""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("flwr"):
    from tests.federation.local import federation, files, no_waiting  # noqa: F401
else:
    collect_ignore_glob = ["test_*.py"]
