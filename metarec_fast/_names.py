"""Names of parameters, and patterns that stand for several of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase


def match_names(argument: str, patterns: str | Sequence[str], names: Iterable[str], kind: str) -> list[str]:
    """Those of the names that a name or pattern ("tower.*") stands for, in their order.

    Raises:
        ValueError: A pattern stands for none; the argument and the names that there are, of what `kind` says, are told.
    """
    known, wanted = list(names), [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ValueError(
                f"{argument}: expected names of {kind} or patterns of them, got {pattern!r}; "
                f"they are {', '.join(known)}"
            )
    return [name for name in known if any(fnmatchcase(name, pattern) for pattern in wanted)]
