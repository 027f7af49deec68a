import os

os.environ["KERAS_BACKEND"] = "torch"

from collections.abc import Iterator

import keras
import pytest


@pytest.fixture(autouse=True)
def plain_keras() -> Iterator[None]:
    """Every test finds Keras's global settings as they are by default."""
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    keras.utils.clear_session(free_memory=False)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "requires_trainable_backend: of Keras's own tests")
