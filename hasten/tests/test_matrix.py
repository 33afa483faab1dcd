"""Every caching method on every one of the sixteen families."""

import pytest
import tiny
from matrix import STEPS, caching_methods, family


@pytest.mark.parametrize("method", caching_methods())
@pytest.mark.parametrize("name", tiny.TINY)
def test_method_on_family(name, method):
    cell = family(name).check(method)
    assert cell.exact
    assert not cell.traces
    assert 1 <= cell.computed < STEPS
    # Embeddings, final layer, and with some methods one block, run on skipped steps as well.
    assert cell.computed / STEPS <= cell.linears < 1
    assert cell.linears <= cell.computed / STEPS + 0.75 * (1 - cell.computed / STEPS)
    assert 0 < cell.error < 0.5
