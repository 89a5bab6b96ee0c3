"""What a value of a configuration may be: a rule a field, checked in one place.

A rule takes a value and returns it in its type, or raises ValueError with what was expected.
"""

import math
import sys
from dataclasses import field

LARGEST = 2**62  # what torch takes as a seed, and counts with


def whole(default, *, least=0, most=LARGEST, words=()):
    """A whole number in a range, or one of some words (None among them)."""
    high = "" if most == LARGEST else f", at most {most}"
    expected = " or ".join([f"a whole number from {least} on{high}", *map(_show, words)])

    def rule(value):
        if _is_word(value, words):
            return None if value == "none" else value
        number = _read_number(value, expected)
        if number != int(number) or not least <= number <= most:
            raise ValueError(expected)
        return int(number)

    return _with_rule(default, rule)


def number(default, *, least=0.0, above=None, most=sys.float_info.max, words=()):
    """A finite number in a range, or one of some words (None among them)."""
    low = f"from {least:g} on" if above is None else f"above {above:g}"
    high = "" if most == sys.float_info.max else f", at most {most:g}"
    expected = " or ".join([f"a number {low}{high}", *map(_show, words)])

    def rule(value):
        if _is_word(value, words):
            return None if value == "none" else value
        read = _read_number(value, expected)
        is_low = read < least if above is None else read <= above
        if is_low or read > most:
            raise ValueError(expected)
        return float(read)

    return _with_rule(default, rule)


def switch(default):
    """True or False."""

    def rule(value):
        if not isinstance(value, bool):
            raise ValueError("true or false")
        return value

    return _with_rule(default, rule)


def choice(default, *choices):
    """One of these."""

    def rule(value):
        if value is False and "no" in choices:  # what YAML makes of it
            value = "no"
        if value not in choices:
            raise ValueError(f"one of {', '.join(map(_show, choices))}")
        return value

    return _with_rule(default, rule)


def some_of(default, *choices):
    """One or more of these, as a sequence or as text with commas between."""

    def rule(value):
        expected = f"one or more of {', '.join(choices)}, each once"
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        chosen = _read_sequence(value, expected)
        if not chosen or not all(name in choices and chosen.count(name) == 1 for name in chosen):
            raise ValueError(expected)
        return chosen

    return _with_rule(default, rule)


def texts(default=()):
    """A sequence of texts; one text stands for itself."""

    def rule(value):
        found = (value,) if isinstance(value, str) else _read_sequence(value, "a list of texts")
        if not all(isinstance(text, str) for text in found):
            raise ValueError("a list of texts")
        return found

    return _with_rule(default, rule)


def text(default, *, words=()):
    """A text that is not empty, or one of some words (None among them); a path is taken as text."""

    def rule(value):
        if _is_word(value, words):
            return None if value == "none" else value
        if not isinstance(value, (str, bytes)) and hasattr(value, "__fspath__"):
            value = str(value)
        if not isinstance(value, str) or not value.strip() or "\0" in value:
            raise ValueError(" or ".join(["a text", *map(_show, words)]))
        return value

    return _with_rule(default, rule)


def _with_rule(default, rule):
    return field(default=default, metadata={"rule": rule})


def _is_word(value, words):
    """Whether a value is one of the words; in a shell and in YAML, none is a word too."""
    return (
        value is None
        and None in words
        or isinstance(value, str)
        and (value in words or value == "none" and None in words)
    )


def _read_number(value, expected):
    # YAML 1.1 reads 1e-4 as a text (it wants 1.0e-4), and a shell has nothing but texts.
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)  # to the last digit, which a float may not have
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        read = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        read = math.nan
    if not math.isfinite(read):
        raise ValueError(expected)
    return read


def _read_sequence(value, expected):
    """Returns a tuple of what is in a sequence; None is an empty one."""
    if value is None:
        return ()
    if not isinstance(value, list | tuple | set | frozenset):
        raise ValueError(expected)
    return tuple(value)


def _show(value):
    return "none" if value is None else str(value)
