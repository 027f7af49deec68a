"""Keras 3 optimizers on the torch backend.

===========================  ======================================================
:func:`keras_neurms`         NeuRMS; its taps attach themselves in ``fit``
:func:`keras_racs`           row and column scaled SGD
:func:`keras_rmnp`           row-momentum normalised preconditioning
:func:`keras_alice`          low-rank Eigen-Adam with tracking and compensation
:func:`keras_eigen_adam`     Adam in the eigenbasis of G G^T
:func:`keras_shared_basis`   blocks of low rank in one shared basis
:func:`keras_optimizer`      any optimizer by its name
:class:`NeurmsOptimizer`     what they all are
===========================  ======================================================

Import this package before loading a ``.keras`` file that was compiled with one of them.
"""

from neurms.core.ground.extras import require

require("keras", extra="keras")

from neurms.integrations.keras.factories import (  # noqa: E402  (keras must be there first)
    keras_alice,
    keras_eigen_adam,
    keras_neurms,
    keras_optimizer,
    keras_racs,
    keras_rmnp,
    keras_shared_basis,
)
from neurms.integrations.keras.optimizer import NeurmsOptimizer  # noqa: E402

__all__ = [
    "NeurmsOptimizer",
    "keras_alice",
    "keras_eigen_adam",
    "keras_neurms",
    "keras_optimizer",
    "keras_racs",
    "keras_rmnp",
    "keras_shared_basis",
]
