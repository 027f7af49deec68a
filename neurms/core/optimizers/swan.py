"""SWAN: SGD with row standardisation and whitening, without any state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from neurms.core.optimizers.base import Params, PreconditionedOptimizer
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.settings import CommonSettings
from neurms.core.structures.one_sided_diagonal import RowStandardized
from neurms.core.structures.one_sided_full import Whitened

__all__ = ["SWAN"]


class SWAN(PreconditionedOptimizer):
    """SGD with normalisation and whitening: the gradient's rows standardised, then whitened.

    N_ij = (G_ij - mean_j G_ij) / std_j G_ij ; U = (N N^T)^(-1/2) N by ``steps`` rounds of the
    coupled Newton-Schulz iteration ; W moves by -lr ||N|| / ||U|| U. State: none.

    Args:
        params: A model (routed by module kind), parameters, or parameter groups.
        lr: Learning rate.
        steps: Rounds of Newton-Schulz.
        beta: Its relaxation. At the paper's .8 singular values of U end in [.56, 1.6], after few
            rounds; at .5 they end at 1, after more.
        rescale: Give U the norm of N; otherwise its norm is about sqrt(min(m, n)).
        **common: :class:`~neurms.core.optimizers.settings.CommonSettings`.

    Raises:
        ValueError: A setting is out of its range.
        TypeError: An unknown setting, or a parameter that is not real floating point.

    Reference:
        Ma et al., "SWAN: SGD with Normalization and Whitening Enables Stateless LLM Training",
        arXiv 2412.13148, Algorithms 1 to 3. Settled: the standard deviation is about the row's
        mean, divided by n, with nothing added to it; constant rows, where it is rounding noise, get
        zero updates, and so does every matrix of one feature. The matrix enters the iteration
        divided by its Frobenius norm, without which it diverges.

    Example:
        >>> import torch, neurms
        >>> weight = torch.nn.Parameter(torch.zeros(1, 2))
        >>> optimizer = neurms.SWAN([weight], lr=0.1)
        >>> weight.grad = torch.tensor([[3.0, 5.0]])
        >>> optimizer.step()
        >>> weight.data
        tensor([[ 0.1000, -0.1000]])
    """

    rule = "swan"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        steps: int = 10,
        beta: float = 0.8,
        rescale: bool = True,
        **common: Unpack[CommonSettings],
    ) -> None:
        settings = {"lr": lr, "steps": steps, "beta": beta, "rescale": rescale}
        super().__init__(params, settings, common)

    @classmethod
    def recipe(cls, settings: Mapping[str, Any]) -> Recipe:
        """Return row standardisation and whitening."""
        whitened = Whitened(settings["steps"], settings["beta"], settings["rescale"])
        return Recipe((RowStandardized(), whitened))
