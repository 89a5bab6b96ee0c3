"""What a value of a configuration may be: a rule a field, checked in one place.

A rule takes a value and returns it in its type, or raises ValueError with what was expected.
"""

import math
from dataclasses import field


def whole(default, *, least=0, words=()):
    """A whole number from `least` on, or one of some words (None among them)."""
    expected = " or ".join([f"a whole number from {least} on", *map(_show, words)])

    def rule(value):
        if _is_word(value, words):
            return None if value == "none" else value
        number = _read_number(value, expected)
        if number != int(number) or number < least:
            raise ValueError(expected)
        return int(number)

    return _with_rule(default, rule)


def number(default, *, least=0.0, above=None, most=math.inf, words=()):
    """A finite number in a range, or one of some words (None among them)."""
    low = f"from {least:g} on" if above is None else f"above {above:g}"
    high = "" if most == math.inf else f", at most {most:g}"
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
        chosen = _read_names(value)
        if not chosen or set(chosen) - set(choices) or len(set(chosen)) < len(chosen):
            raise ValueError(f"one or more of {', '.join(choices)}, each once")
        return chosen

    return _with_rule(default, rule)


def texts(default=()):
    """A sequence of texts; one text stands for itself."""

    def rule(value):
        found = (value,) if isinstance(value, str) else tuple(value or ())
        if not all(isinstance(text, str) for text in found):
            raise ValueError("texts")
        return found

    return _with_rule(default, rule)


def text(default, *, words=()):
    """A text that is not empty, or one of some words (None among them); a path is taken as text."""

    def rule(value):
        if _is_word(value, words):
            return None if value == "none" else value
        if not isinstance(value, (str, bytes)) and hasattr(value, "__fspath__"):
            value = str(value)
        if not isinstance(value, str) or not value.strip():
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
    try:
        read = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        read = math.nan
    if not math.isfinite(read):
        raise ValueError(expected)
    return read


def _read_names(value):
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value or ())


def _show(value):
    return "none" if value is None else str(value)
