"""B R_i B^T + rho_i I: against the algorithm on dense n x n matrices in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from neurms.compiled.native import LEAST_ELEMENTS, compiler
from neurms.compiled.unit_blocks import move_unit_blocks_, mover
from neurms.core.optimizers.plan import tensor_bytes
from neurms.core.structures import shared_basis
from neurms.core.structures.base import Context
from neurms.core.structures.shared_basis import SharedBasisBlocks
from neurms.testing import TransformContract, gradients, run


def dense(
    steps: Tensor, rank: int, decay: float, eps: float
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Algorithm 1 with every M_i formed; returns updates, the last blocks H_i and rho."""
    m, n = steps.shape[1:]
    identity = torch.eye(n, dtype=steps.dtype)
    longest = steps[0].norm(dim=1).argsort(descending=True)[:rank]
    basis = torch.linalg.qr(steps[0][longest].T, mode="complete").Q[:, :rank]
    blocks, rho = torch.zeros(m, n, n, dtype=steps.dtype), torch.zeros(m, dtype=steps.dtype)
    updates = []
    for gradient in steps:
        full = decay * blocks + torch.einsum("ia,ib->iab", gradient, gradient)
        basis = torch.linalg.qr((full @ full).sum(0) @ basis).Q
        small = basis.T @ full @ basis
        least = torch.linalg.eigvalsh(small)[:, 0].clamp(min=0.0)
        small = small - least[:, None, None] * torch.eye(basis.shape[1], dtype=steps.dtype)
        blocks = basis @ small @ basis.T
        rho = decay * rho + torch.linalg.matrix_norm(full - blocks, ord=2)
        values, vectors = torch.linalg.eigh(blocks + (rho + eps)[:, None, None] * identity)
        root = vectors @ torch.diag_embed(values.rsqrt()) @ vectors.mT
        updates.append((root @ gradient[..., None])[..., 0])
    return updates, blocks, rho


class TestOversampled(TransformContract):
    transform = SharedBasisBlocks(rank=2, eps=1e-3, oversampling=1, iterations=2)


class TestSharedBasisBlocks(TransformContract):
    transform = SharedBasisBlocks(rank=3, eps=1e-3)

    @pytest.mark.parametrize("shape", [(6, 4), (3, 8), (9, 6)])
    @pytest.mark.parametrize("decay", [1.0, 0.9])
    def test_with_all_directions_it_is_block_diagonal_adagrad(
        self, shape: tuple[int, int], decay: float
    ) -> None:
        steps = gradients(*shape, steps=12)
        n = shape[1]
        updates, _ = run(SharedBasisBlocks(rank=n, decay=decay, eps=1e-6), steps)
        sums = torch.zeros(shape[0], n, n, dtype=steps.dtype)
        for gradient, update in zip(steps, updates, strict=True):
            sums = decay * sums + torch.einsum("ia,ib->iab", gradient, gradient)
            values, vectors = torch.linalg.eigh(sums)
            scale = (values.clamp(min=0.0) + 1e-6).rsqrt()
            root = vectors @ torch.diag_embed(scale) @ vectors.mT
            expected = (root @ gradient[..., None])[..., 0]
            torch.testing.assert_close(update, expected, rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("shape", [(12, 7), (5, 16)])
    @pytest.mark.parametrize("rank", [1, 2, 4])
    @pytest.mark.parametrize("decay", [1.0, 0.9])
    def test_equals_the_dense_algorithm(
        self, shape: tuple[int, int], rank: int, decay: float
    ) -> None:
        steps = gradients(*shape, steps=6)
        transform = SharedBasisBlocks(rank, decay, eps=1e-2)
        updates, state = run(transform, steps)
        expected, blocks, rho = dense(steps, rank, decay, eps=1e-2)
        for ours, theirs in zip(updates, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        basis = state["basis"]
        ours = basis @ state["blocks"] @ basis.mT
        torch.testing.assert_close(ours, blocks, rtol=1e-5, atol=1e-5 * float(blocks.max()))
        torch.testing.assert_close(state["rho"], rho, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("shape", [(12, 7), (2, 12, 7)])
    @pytest.mark.parametrize("rank", [3, 7])
    def test_units_are_independent_of_the_part_they_fall_in(
        self, shape: tuple[int, ...], rank: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        steps = torch.randn(5, *shape, dtype=torch.float64)
        transform = SharedBasisBlocks(rank, decay=0.9, eps=1e-2)
        whole, state = run(transform, steps)
        monkeypatch.setattr(shared_basis, "_PART", 5)
        parts, parted = run(transform, steps)
        torch.testing.assert_close(parts, whole, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(parted, state, rtol=1e-7, atol=1e-9)
        again = transform.precondition(steps[-1], parted, Context(6))
        torch.testing.assert_close(again, parts[-1], rtol=1e-7, atol=1e-9)

    @pytest.mark.parametrize("gradient_rank", [2, 4, 9])
    @pytest.mark.parametrize("rank", [1, 2, 4, 9])
    @pytest.mark.parametrize("decay", [1.0, 0.9])
    def test_the_blocks_bound_adagrads_from_above(
        self, rank: int, gradient_rank: int, decay: float
    ) -> None:
        left = gradients(16, gradient_rank, steps=20)
        steps = left @ gradients(gradient_rank, 9, steps=1, seed=1)
        transform = SharedBasisBlocks(rank, decay, eps=1e-2, norm_iterations=40)
        state, exact = transform.init(steps[0]), torch.zeros(16, 9, 9, dtype=steps.dtype)
        identity = torch.eye(9, dtype=steps.dtype)
        for number, gradient in enumerate(steps, 1):
            update = transform(gradient, state, Context(number))
            exact = decay * exact + gradient[:, :, None] * gradient[:, None, :]
            basis = state["basis"]
            bound = basis @ state["blocks"] @ basis.mT + state["rho"][:, None, None] * identity
            size = exact.diagonal(dim1=-2, dim2=-1).sum(-1)
            assert (torch.linalg.eigvalsh(bound - exact)[:, 0] >= -1e-10 * size).all()
            # A larger matrix has the smaller inverse root: no row is longer than AdaGrad's.
            roots = torch.linalg.inv(exact + 1e-2 * identity)
            longest = torch.einsum("ua,uab,ub->u", gradient, roots, gradient)
            assert (update.square().sum(-1) <= longest * (1 + 1e-6)).all()

    @pytest.mark.parametrize("iterations", [1, 3])
    @pytest.mark.parametrize("oversampling", [0, 2, 50])
    def test_oversampling_and_iterations(self, oversampling: int, iterations: int) -> None:
        steps, k = gradients(6, 9, steps=5), 3
        transform = SharedBasisBlocks(
            k, oversampling=oversampling, iterations=iterations, norm_iterations=40
        )
        state = transform.init(steps[0])
        width = min(k + oversampling, 9)
        assert state["basis"].shape == (9, width)
        longest = steps[0].norm(dim=1).argsort(descending=True)[:width]
        directions = torch.linalg.qr(steps[0][longest].T, mode="complete").Q[:, :width]
        blocks = torch.zeros(6, 9, 9, dtype=steps.dtype)
        for number, gradient in enumerate(steps, 1):
            transform(gradient, state, Context(number))
            full = blocks + gradient[:, :, None] * gradient[:, None, :]
            squares = (full @ full).sum(0)
            for _ in range(iterations):
                directions = torch.linalg.qr(squares @ directions).Q
            vectors = torch.linalg.eigh(directions.mT @ squares @ directions)[1]
            directions = directions @ vectors.flip(1)
            basis = directions[:, :k]
            ours = state["basis"][:, :k]
            torch.testing.assert_close(ours @ ours.mT, basis @ basis.mT, rtol=0, atol=1e-7)
            small = basis.mT @ full @ basis
            least = torch.linalg.eigvalsh(small)[:, 0, None, None]
            blocks = basis @ (small - least * torch.eye(k, dtype=steps.dtype)) @ basis.mT
            found = ours @ state["blocks"] @ ours.mT
            torch.testing.assert_close(found, blocks, rtol=1e-6, atol=1e-6 * float(blocks.max()))
        if oversampling == 50:
            leading = torch.linalg.eigh(squares)[1][:, -k:]
            torch.testing.assert_close(ours @ ours.mT, leading @ leading.mT, rtol=0, atol=1e-7)

    @pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this machine")
    @pytest.mark.parametrize("decay", [1.0, 0.9])
    @pytest.mark.parametrize("rank", [16, 24])
    def test_the_native_form_equals_the_dense_algorithm(self, rank: int, decay: float) -> None:
        units = -(-LEAST_ELEMENTS // rank**2)  # so many that the native form is the one that runs
        steps = gradients(units, 48, steps=4, dtype=torch.float32)
        assert mover(torch.empty(units, rank, rank)) is not move_unit_blocks_
        transform = SharedBasisBlocks(rank, decay, eps=1e-2, norm_iterations=40)
        updates, state = run(transform, steps)
        expected, blocks, rho = dense(steps.double(), rank, decay, eps=1e-2)
        for ours, theirs in zip(updates, expected, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(state["rho"].double(), rho, rtol=1e-4, atol=1e-4)
        ours = state["basis"] @ state["blocks"] @ state["basis"].mT
        atol = 1e-4 * float(blocks.max())
        torch.testing.assert_close(ours.double(), blocks, rtol=1e-3, atol=atol)

    @pytest.mark.parametrize("rank", [2, 8])
    def test_the_spectral_norm_is_near_from_below(self, rank: int) -> None:
        steps = gradients(12, 40, steps=8)
        _, state = run(SharedBasisBlocks(rank, norm_iterations=16), steps)
        _, _, rho = dense(steps, rank, 1.0, 1e-6)
        assert (state["rho"] <= rho * (1 + 1e-9)).all()
        assert (state["rho"] >= (1 - 1e-4) * rho).all()

    def test_precondition_is_the_dense_root_of_the_state(self) -> None:
        steps = gradients(4, 6, steps=5)
        transform = SharedBasisBlocks(rank=2, eps=1e-3)
        _, state = run(transform, steps[:4])
        update = transform.precondition(steps[4], state, Context(5))
        basis, ridge = state["basis"], (state["rho"] + 1e-3)[:, None, None]
        blocks = basis @ state["blocks"] @ basis.mT + ridge * torch.eye(6, dtype=steps.dtype)
        fisher = torch.block_diag(*blocks)
        values, vectors = torch.linalg.eigh(fisher)
        expected = vectors @ ((vectors.mT @ steps[4].reshape(-1)) / values.sqrt())
        torch.testing.assert_close(update.reshape(-1), expected, rtol=1e-8, atol=1e-10)

    def test_state_is_nk_plus_m_k_squared_plus_m(self) -> None:
        matrix = torch.empty(7, 11, device="meta")
        assert tensor_bytes(SharedBasisBlocks(rank=4).init(matrix)) == 4 * (11 * 4 + 7 * 16 + 7)
        assert tensor_bytes(SharedBasisBlocks(rank=40).init(matrix)) == 4 * (121 + 7 * 121 + 7)

    def test_nothing_of_size_n_by_n_is_ever_formed(self) -> None:
        n, m, k = 4096, 24, 32
        largest = _largest_tensor(SharedBasisBlocks(k), torch.randn(2, m, n))
        assert largest <= 2 * n * k
        assert largest < n * n // 32

    def test_basis_stays_orthonormal(self) -> None:
        steps = gradients(10, 16, steps=60, dtype=torch.float32)
        steps[10:20] *= 1e6
        _, state = run(SharedBasisBlocks(rank=5), steps)
        identity = torch.eye(5)
        torch.testing.assert_close(state["basis"].mT @ state["basis"], identity, rtol=0, atol=1e-5)

    def test_starts_with_the_first_gradient_that_is_not_zero(self) -> None:
        steps = torch.zeros(5, 4, 8, dtype=torch.float64)
        steps[2:] = gradients(4, 8, steps=3)
        steps[..., :3] = 0  # features that never fire must not hold the first basis
        late, _ = run(SharedBasisBlocks(rank=2), steps)
        prompt, _ = run(SharedBasisBlocks(rank=2), steps[2:])
        for a, b in zip(late[2:], prompt, strict=True):
            torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e12])
    def test_extreme_scales_in_float32(self, scale: float) -> None:
        steps = gradients(6, 9, steps=6, dtype=torch.float32)
        updates, _ = run(SharedBasisBlocks(rank=3, eps=1e-30), steps * scale)
        expected, _ = run(SharedBasisBlocks(rank=3, eps=1e-30), steps.double())
        for ours, truth in zip(updates, expected, strict=True):
            assert ours.isfinite().all()
            torch.testing.assert_close(ours.double(), truth, rtol=0.02, atol=0.02)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"rank": 0}, "rank=0"),
            ({"decay": 1.5}, "decay=1.5"),
            ({"eps": 0.0}, "eps=0.0"),
            ({"norm_iterations": 0}, "norm_iterations=0"),
            ({"oversampling": -1}, "oversampling=-1"),
            ({"iterations": 0}, "iterations=0"),
        ],
    )
    def test_bad_settings(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SharedBasisBlocks(**settings)


def _largest_tensor(transform: SharedBasisBlocks, steps: Tensor) -> int:
    class Recorder(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, Tensor):
                    self.largest = max(self.largest, tensor.untyped_storage().nbytes() // 4)
            return out

    with Recorder() as recorder:
        run(transform, steps)
    return recorder.largest
