"""Muon: momentum orthogonalised by Newton-Schulz."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

from neurms.core.optimizers.base import Params
from neurms.core.optimizers.in_backward import UpdateMode
from neurms.core.optimizers.momentum_first import MomentumFirst
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.settings import CommonSettings
from neurms.core.structures.one_sided_full import MUON_COEFFICIENTS, Orthogonalized, Precision
from neurms.core.transforms.momentum import Momentum
from neurms.core.transforms.shape_scale import ShapeScale, ShapeScaling

__all__ = ["Muon"]


class Muon(MomentumFirst):
    """Momentum orthogonalised by Newton-Schulz: whitening with F ~ I (x) M from one sample.

    M <- mu M + (1 - mu) G ; R = (1 - mu) G + mu M (``nesterov``) or M ; W moves by -lr a(m, n) U
    V^T, where R = U S V^T and a(m, n) is a factor of the shape. State: mn numbers, none for mu = 0.

    Args:
        params: A model (routed by module kind), parameters, or parameter groups.
        lr: Learning rate.
        momentum: mu.
        nesterov: Look ahead.
        steps: Rounds of Newton-Schulz.
        coefficients: Its three coefficients.
        adjust_lr: a(m, n): ``"original"`` sqrt(max(1, m/n)), ``"match_rms_adamw"``
            .2 sqrt(max(m, n)), None 1.
        precision: Of Newton-Schulz's products: ``"float32"`` (the matrix's own), or the reference's
            ``"bfloat16"``, whose updates differ by 1 to 4 %; faster where the processor has them
            (``neurms doctor`` shows), no slower elsewhere.
        update: ``"step"``, or ``"backward"``, without ``nesterov``: the backward of each
            ``nn.Linear`` under the rule adds (1 - mu) D^T H to M, and no gradient of its weight is
            formed, which saves that memory. The batch may come in parts. What acts on gradients
            (clipping, a GradScaler, several ranks) is refused; see the guide.
        **common: :class:`~neurms.core.optimizers.settings.CommonSettings`.

    Raises:
        ValueError: A setting is out of its range, or ``update="backward"`` meets ``nesterov`` or
            no momentum.
        TypeError: An unknown setting, a parameter that is not real floating point, or parameters
            without their model for ``update="backward"``.
        UnsupportedTrainingError: Several ranks train, and ``update="backward"``.

    Reference:
        Jordan et al., "Muon", 2024, as in torch.optim.Muon. Departures: float32 by
        default; no eps, so that small gradients count in
        full; tensors of more than two axes are flattened to (units, features); ``weight_decay`` is
        0 by default, there .1.

    Example:
        >>> import torch, neurms
        >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = neurms.Muon([weight], lr=0.1)
        >>> weight.grad = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> optimizer.step()
        >>> weight.data
        tensor([[-0.1108,  0.0000],
                [ 0.0000, -0.1108]])
    """

    rule = "muon"

    def __init__(
        self,
        params: Params,
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        steps: int = 5,
        coefficients: tuple[float, float, float] = MUON_COEFFICIENTS,
        adjust_lr: ShapeScaling | None = "original",
        precision: Precision = "float32",
        update: UpdateMode = "step",
        **common: Unpack[CommonSettings],
    ) -> None:
        settings = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "steps": steps,
            "coefficients": coefficients,
            "adjust_lr": adjust_lr,
            "precision": precision,
        }
        super().__init__(params, settings, common, update)

    @classmethod
    def recipe(cls, settings: Mapping[str, Any]) -> Recipe:
        """Return averaging, orthogonalisation and the factor of the shape."""
        return Recipe(
            (
                Momentum(settings["momentum"], settings["nesterov"]),
                Orthogonalized(
                    settings["steps"], tuple(settings["coefficients"]), settings["precision"]
                ),
                ShapeScale(settings["adjust_lr"]),
            )
        )
