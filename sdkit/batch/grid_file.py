"""The text of a grid: YAML 1.2's plain values, and the line at which each key stands."""

import re

import yaml

from sdkit.validation import ValidationError


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values: 1e-4 is a number, on and no are words, 2026-01-01 is a word."""

    yaml_implicit_resolvers = {}


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first
    )
# SafeLoader reads 010 as eight and 1:30 as ninety; YAML 1.2 does not.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))
_Loader.add_constructor(
    "tag:yaml.org,2002:float",
    lambda _, node: float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan")),
)


def parse_grid(text, name):
    """Reads YAML; a key that is there twice is refused, of which YAML would take the last.

    Args:
        text: Of the file.
        name: Of the file, for messages.

    Returns:
        The content, and {key: line in the file}.

    Raises:
        ValidationError: It is no YAML, a key is there twice, or an anchor contains itself.
    """
    try:
        root = yaml.compose(text, _Loader)
        lines = _find_lines(root, name)
        return yaml.load(text, _Loader), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValidationError(f"{name}{line}: not valid YAML ({problem}).") from error


def _find_lines(node, name, above=()):
    lines = {}
    if any(node is outer for outer in above):
        line = node.start_mark.line + 1
        raise ValidationError(f"{name}, line {line}: an anchor (&) that contains itself (*).")
    above = (*above, node)
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            lines.update(_find_lines(item, name, above))
    elif isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key.value, str) and keys.count(key.value) > 1:
                raise ValidationError(f"{name}, line {line}: {key.value} is there twice.")
            below = _find_lines(value, name, above)
            lines = {**below, **lines, key.value: line} if isinstance(key.value, str) else lines
    return lines
