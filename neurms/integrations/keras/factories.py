"""Functions that make Keras optimizers; they read well in ``model.compile``."""

from __future__ import annotations

from typing import Any

import keras

from neurms.core.optimizers.registry import is_torch
from neurms.integrations.keras.classes import keras_class
from neurms.integrations.keras.settings import check_backend, refuse_rate

__all__ = [
    "keras_alice",
    "keras_eigen_adam",
    "keras_neurms",
    "keras_optimizer",
    "keras_racs",
    "keras_rmnp",
    "keras_shared_basis",
]

_BUILT_IN = {
    "sgd": keras.optimizers.SGD,
    "rmsprop": keras.optimizers.RMSprop,
    "adam": keras.optimizers.Adam,
    "adamw": keras.optimizers.AdamW,
    "adafactor": keras.optimizers.Adafactor,
}


def keras_optimizer(name: str, /, learning_rate: Any = None, **settings: Any) -> Any:
    """Make a Keras optimizer by the name that ``neurms.create`` knows it by.

    Args:
        name: One of ``neurms.available()``. torch's own (``sgd``, ``adamw``, ...) stand for Keras's
            optimizers of that name, with Keras's settings and defaults.
        learning_rate: A float, a schedule or a callable; None is the optimizer's default.
        **settings: Keras's own arguments (``weight_decay``, ``clipnorm``, ``use_ema``,
            ``gradient_accumulation_steps``, ...), the rule's settings and the common ones; see
            :class:`~neurms.integrations.keras.optimizer.NeurmsOptimizer`.

    Returns:
        A registered ``keras.optimizers.Optimizer``.

    Raises:
        ValueError: No optimizer has that name; a setting is out of its range; Keras does not run on
            torch.
        TypeError: The rule has no such setting.

    Example:
        >>> keras_optimizer("muon", learning_rate=0.01, momentum=0.9).get_config()["momentum"]
        0.9
    """
    check_backend(f"keras_optimizer({name!r})")
    if is_torch(name):
        refuse_rate(settings)
        rate = {} if learning_rate is None else {"learning_rate": learning_rate}
        return _BUILT_IN[name](**rate, **settings)
    return keras_class(name)(learning_rate, **settings)


def keras_neurms(learning_rate: Any = 1e-2, variant: str = "P", **settings: Any) -> Any:
    """Make :class:`neurms.NeuRMS` for Keras; the taps of U, B and F attach themselves in ``fit``.

    Args:
        learning_rate: A float, a schedule or a callable.
        variant: ``"P"``, which has no taps, or the draft's ``"U"``, ``"B"`` and ``"F"``.
        **settings: ``beta=None, eps=1e-8, s_max=100., momentum=0., agc=None, clip="absolute",
            normalize=None, nesterov=False, moments="gradient", damping=None,
            loss_reduction="mean"``, ... as in :class:`neurms.NeuRMS` (but for
            ``update``, ``gemm`` and ``loss_scale``, which Keras settles), the common settings and
            Keras's own arguments.

    Returns:
        The optimizer.

    Example:
        >>> import keras, numpy
        >>> model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])
        >>> model.compile(optimizer=keras_neurms(variant="F"), loss="mse")
        >>> history = model.fit(numpy.ones((4, 3)), numpy.ones((4, 2)), verbose=0)
        >>> for row in model.optimizer.plan():
        ...     print(row.name.rpartition("/")[2], row.rule, row.state_bytes)
        kernel neurms 20
        bias neurms 0
    """
    return keras_optimizer("neurms", learning_rate, variant=variant, **settings)


def keras_racs(learning_rate: Any = 0.02, **settings: Any) -> Any:
    """Make :class:`neurms.RACS` for Keras.

    Args:
        learning_rate: A float, a schedule or a callable.
        **settings: ``beta=.9, alpha=.05, gamma=1.01, iterations=5, bias_correction=False,
            fit="power"``, the common settings and Keras's own arguments.

    Returns:
        The optimizer.

    Example:
        >>> import keras, numpy
        >>> model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])
        >>> model.compile(optimizer=keras_racs(learning_rate=0.01, weight_decay=0.1), loss="mse")
        >>> history = model.fit(numpy.ones((4, 3)), numpy.ones((4, 2)), verbose=0)
    """
    return keras_optimizer("racs", learning_rate, **settings)


def keras_rmnp(learning_rate: Any = 0.02, **settings: Any) -> Any:
    """Make :class:`neurms.RMNP` for Keras: rows are outputs, normalised over their inputs.

    Args:
        learning_rate: A float, a schedule or a callable.
        **settings: ``momentum=.95, nesterov=True, shape_scale=True``, the common settings and
            Keras's own arguments.

    Returns:
        The optimizer.

    Example:
        >>> keras_rmnp(momentum=0.9).get_config()["momentum"]
        0.9
    """
    return keras_optimizer("rmnp", learning_rate, **settings)


def keras_alice(learning_rate: Any = 0.02, **settings: Any) -> Any:
    """Make :class:`neurms.Alice` for Keras; ``tracking=False`` is Alice-0.

    Args:
        learning_rate: A float, a schedule or a callable.
        **settings: ``rank=128, leading=40, interval=200, betas=(.9, .9, .999), alpha=.3,
            compensation=.4``, ... as in :class:`neurms.Alice`, the common settings and Keras's own
            arguments.

    Returns:
        The optimizer.

    Example:
        >>> keras_alice(rank=4, leading=2).get_config()["rank"]
        4
    """
    return keras_optimizer("alice", learning_rate, **settings)


def keras_eigen_adam(learning_rate: Any = 1e-3, **settings: Any) -> Any:
    """Make :class:`neurms.EigenAdam` for Keras.

    Args:
        learning_rate: A float, a schedule or a callable.
        **settings: ``betas=(.9, .999, .999), interval=10, eps=1e-8``, the common settings and
            Keras's own arguments.

    Returns:
        The optimizer.

    Example:
        >>> keras_eigen_adam(interval=5).get_config()["interval"]
        5
    """
    return keras_optimizer("eigen_adam", learning_rate, **settings)


def keras_shared_basis(learning_rate: Any = 1e-3, **settings: Any) -> Any:
    """Make :class:`neurms.SharedBasis` for Keras.

    Args:
        learning_rate: A float, a schedule or a callable.
        **settings: ``rank=32, decay=1.0, eps=1e-6, momentum=.9, grafting="rmsprop_normalized"``,
            the common settings and Keras's own arguments.

    Returns:
        The optimizer.

    Example:
        >>> keras_shared_basis(rank=4).get_config()["rank"]
        4
    """
    return keras_optimizer("shared_basis", learning_rate, **settings)
