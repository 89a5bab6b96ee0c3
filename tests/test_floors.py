"""Imports only go down the floors, and no two modules need each other."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (  # from the ground up; a floor may look at those before it, and into itself
    ("verdict", "run_folder", "emulate", "memory"),
    ("validation", "figures"),
    ("device", "finding", "slicing", "mini", "steps", "hooks"),
    ("attention", "guarding"),
    ("loading",),
    ("generation",),
    ("diagnosis",),
    ("precision",),
    ("finetuning",),
    ("batch", "exploration"),
    ("demo_page",),
    ("demo",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
LEVELS = {name: level for level, floor in enumerate(FLOORS) for name in floor}
# `accelerate launch -m sdkit.finetuning.train`: a name for the command line, which nothing imports.
ENTRY_POINTS = {"sdkit.finetuning.train"}


def find_modules():
    """{dotted name: the names of sdkit that it imports, also within functions}."""
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / "sdkit").rglob("*.py")
    }
    found = {}
    for name, path in names.items():
        imported = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                submodules = {f"{node.module}.{alias.name}" for alias in node.names}
                imported |= submodules & names.keys() or {node.module}
        found[name] = {one for one in imported if one.partition(".")[0] == "sdkit"} - {name}
    return found


MODULES = find_modules()


def test_every_module_has_its_floor():
    tops = {name.split(".")[1] for name in MODULES if "." in name}
    assert tops and tops <= LEVELS.keys()


@pytest.mark.parametrize("top", sorted(LEVELS))
def test_imports_go_down(top):
    inside = {
        name: imported
        for name, imported in MODULES.items()
        if name.split(".")[1:2] == [top] and name not in ENTRY_POINTS
    }
    upwards = [
        f"{name} imports {other}"
        for name, imported in inside.items()
        for other in imported
        if "." in other
        if (floor := other.split(".")[1]) != top and LEVELS[floor] >= LEVELS[top]
    ]
    assert not upwards


def test_no_two_modules_need_each_other():
    graph = {name: imported for name, imported in MODULES.items() if name not in ENTRY_POINTS}
    list(TopologicalSorter(graph).static_order())  # CycleError names the circle
