"""Which rows a rank holds, and the factors that act on them."""

from __future__ import annotations

import pytest
import torch

from neurms.core.ground.layout import Layout, default_layout
from neurms.core.ground.shards import RowShard, is_sharded, local, own_part, placed_like


def test_plain_tensors_pass_through() -> None:
    tensor = torch.ones(3, 2)
    assert not is_sharded(tensor)
    assert local(tensor) is tensor
    assert own_part(tensor, tensor) is tensor
    assert placed_like(tensor, tensor) is tensor


@pytest.mark.parametrize(("start", "rows"), [(0, 2), (2, 3), (5, 1), (3, 3)])
def test_factors_of_a_grouped_convolution_cut_anywhere(start: int, rows: int) -> None:
    torch.manual_seed(0)
    layout = Layout((6, 2, 3), (0,), (1,), (2,), groups=2)
    weight, s, c = torch.randn(6, 2, 3), torch.rand(6), torch.rand(4)
    wanted = layout.blocks(weight) * layout.unit_factors(s) * layout.feature_factors(c)
    wanted = wanted.reshape(6, 2, 3)[start : start + rows]
    shard = RowShard(start, rows, 6)
    own, own_s, own_c = shard.narrowed(layout, s, c)
    assert own_s is not None
    assert own_c is not None
    found = own.blocks(weight[start : start + rows])
    found = found * own.unit_factors(own_s) * own.feature_factors(own_c)
    torch.testing.assert_close(found.reshape(rows, 2, 3), wanted)


def test_a_bias_is_cut_like_its_units() -> None:
    layout, s, c = RowShard(2, 2, 5).narrowed(
        default_layout(torch.ones(5)), torch.arange(5.0), None
    )
    assert layout.shape == (2,)
    assert s is not None
    assert s.tolist() == [2.0, 3.0]
    assert c is None


def test_part_as_a_matrix() -> None:
    layout = RowShard(0, 4, 6).layout(Layout((6, 2, 3), (0,), (1,), (2,), groups=2))
    assert layout.matrix_shape == (4, 6)
