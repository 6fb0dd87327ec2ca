"""Phrases that several error messages share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # A spreadsheet runs a cell that starts with one of them.
LONGEST_LINE = 400  # characters of an error that is passed on


def shortened(items: Iterable[object], shown: int = 6) -> str:
    """Write a list in words, cut after the first items.

    Examples:
        >>> shortened(["a", "b", "c"])
        'a, b, c'
        >>> shortened(range(100), shown=2)
        '0, 1 and 98 more'
    """
    words = [str(item) for item in items]
    rest = len(words) - shown
    return f"{', '.join(words[:shown])} and {rest} more" if rest > 0 else ", ".join(words)


def unknown_adapter(unknown: str | Iterable[str], known: Iterable[str]) -> str:
    """Write the sentence about adapter names that a model does not have.

    Args:
        unknown: The unknown name, or several.
        known: The names that the model has.

    Examples:
        >>> unknown_adapter("emotion", ["asr", "speaker"])
        "There is no adapter 'emotion'; the model has 'asr', 'speaker'."
    """
    unknown = [unknown] if isinstance(unknown, str) else sorted(unknown)
    return (
        f"There is no adapter {shortened(map(repr, unknown))}; the model has "
        f"{shortened(map(repr, sorted(known))) or 'none'}."
    )


def brief(value: object, length: int = 80) -> str:
    """Return the `repr` of a value, cut in the middle if it is too long.

    Examples:
        >>> brief([0, 1, 2])
        '[0, 1, 2]'
        >>> brief(list(range(1000)), length=20)
        '[0, 1, 2...998, 999]'
    """
    text = repr(value)
    half = length // 2 - 2
    return text if len(text) <= length else f"{text[:half]}...{text[-length + half + 3 :]}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, cut if it is long, or the name of its class without a message."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]} ..."


def spreadsheet_cell(value: Any) -> Any:
    """Escape text that a spreadsheet would run, by an apostrophe, as OWASP advises."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
