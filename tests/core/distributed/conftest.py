from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.core.distributed.ranks import Ranks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if "tests/core/distributed/" in str(item.path)]
    for item in here:
        if "pool" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.distributed)
            item.add_marker(pytest.mark.timeout(300))
            if not torch.distributed.is_gloo_available():
                item.add_marker(pytest.mark.skip(reason="needs gloo"))


@pytest.fixture(scope="session")
def pool() -> Iterator[Ranks]:
    """Processes for all distributed tests of the session."""
    ranks = Ranks()
    yield ranks
    ranks.close()
