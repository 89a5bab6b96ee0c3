"""One test a case; all but those of the short campaign are marked slow."""

import pytest


def parametrize(cases):
    """Parametrises a test over cases that have a `name` and say whether they are `fast`."""
    marked = [
        pytest.param(case, id=case.name, marks=[] if case.fast else pytest.mark.slow)
        for case in cases
    ]
    assert marked
    return pytest.mark.parametrize("case", marked)
