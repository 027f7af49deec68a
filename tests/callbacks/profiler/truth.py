"""Every statistic of the profiler once more: numpy, float64, on tensors dumped by other hooks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


class Dump:
    """D, H and G of one layer, window by window."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.windows: list[dict[str, np.ndarray]] = []
        self._errors: list[Tensor] = []
        self._inputs: list[Tensor] = []
        layer.register_forward_hook(self._forward)

    def _forward(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            inputs = args[0].detach().clone()
            output.register_hook(lambda d: self._backward(d, inputs))

    def _backward(self, errors: Tensor, inputs: Tensor) -> None:
        self._errors.append(errors.detach().clone())
        self._inputs.append(inputs)

    def close(self) -> None:
        """End a window; call it when gradients are complete."""
        self.windows.append(
            {
                "d": np.concatenate([_rows(d) for d in self._errors]),
                "h": np.concatenate([_rows(h) for h in self._inputs]),
                "g": self.layer.weight.grad.detach().double().numpy().copy(),
            }
        )
        self._errors, self._inputs = [], []


def _rows(tensor: Tensor) -> np.ndarray:
    return tensor.double().reshape(-1, tensor.shape[-1]).numpy()


def moments(window: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean squares of the per-row error (a mean loss: D = N d) and of the input."""
    d, h = window["d"], window["h"]
    return len(d) * (d**2).sum(0), (h**2).mean(0)


def averaged(windows: list[dict[str, np.ndarray]], beta: float) -> tuple[np.ndarray, np.ndarray]:
    """Bias-corrected moving averages of both over the windows."""
    v = u = 0.0
    for window in windows:
        new_v, new_u = moments(window)
        v, u = beta * v + (1 - beta) * new_v, beta * u + (1 - beta) * new_u
    correction = 1 - beta ** len(windows)
    return v / correction, u / correction


def rho(g: np.ndarray, v: np.ndarray, u: np.ndarray) -> float:
    """Pearson's correlation of G^2 and v u^T, with v u^T formed."""
    return float(np.corrcoef((g**2).ravel(), np.outer(v, u).ravel())[0, 1])


def error(window: dict[str, np.ndarray]) -> float:
    """The factorisation's relative error, row by row."""
    d, h = window["d"], window["h"]
    joint = np.einsum("ri,rj->ij", d**2, h**2) / len(d)
    return float(
        np.linalg.norm(joint - np.outer((d**2).mean(0), (h**2).mean(0))) / np.linalg.norm(joint)
    )


def dominance(matrix: np.ndarray) -> tuple[float, float, float]:
    """r_avg, r_min, r_max from the whole Gram matrix, rows of zeros left out."""
    gram = np.abs(matrix @ matrix.T)
    diagonal = np.diag(gram)
    others = (gram.sum(1) - diagonal) / (len(gram) - 1)
    r = diagonal[diagonal > 0] / others[diagonal > 0]
    return float(r.mean()), float(r.min()), float(r.max())


def quantiles(values: np.ndarray) -> np.ndarray:
    """The seven levels of the report."""
    return np.quantile(values, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1])


def mlp() -> nn.Sequential:
    """A small network whose second activation works in place."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 9), nn.ReLU(inplace=True), nn.Linear(9, 4)
    )
