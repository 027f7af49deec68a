"""What a layer costs in Python calls: bounds that a change to the step's road would break."""

from __future__ import annotations

import pytest

from benchmarks.calls import OPTIMIZERS, added_calls
from neurms.compiled.native import wide_float32

# Of what stands in benchmarks/results/calls.json, with a little room for other versions of torch.
MOST = {
    "RMNP": 26,
    "RACS": 21,
    "NeuRMS-P": 5,
    "NeuRMS-P average": 5,
    "NeuRMS-U": 55,
    "NeuRMS-F": 70,
    "NeuRMS-U backward": 110,
    "NeuRMS-P backward": 270,
    "RMNP backward": 105,
    "Alice": 86,
    "Muon": 54,
}


# One call of BLAS takes few of Python; a product of our own looks at its operands first.
OWN_PRODUCT = 16


@pytest.mark.parametrize("name", MOST)
def test_a_layer_makes_no_more_calls_than_it_did(name: str) -> None:
    multiplies = name.endswith("backward") and wide_float32()
    assert added_calls(OPTIMIZERS[name]) <= MOST[name] + OWN_PRODUCT * multiplies


def test_torch_itself_is_counted_in_the_same_way() -> None:
    """A count that missed built-in functions would find next to nothing of torch's AdamW."""
    assert 30 <= added_calls(OPTIMIZERS["torch's AdamW"]) <= 70
