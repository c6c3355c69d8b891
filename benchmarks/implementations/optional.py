"""Packages that need not be there: a missing one is named, with what installs it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable


def missing_package(module: str, remedy: str = "pip install 'metarec-fast[bench]'") -> Callable[[], str | None]:
    """What to say where `module` is not installed; None where it is."""
    return lambda: None if importlib.util.find_spec(module) else f"{module} is not installed: {remedy}"
