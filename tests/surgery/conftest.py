"""The fixtures of the export tests."""

from tests.export.conftest import _exported, exported, quiet, trained  # noqa: F401
