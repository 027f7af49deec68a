import sys

import pytest
import torch

from neurms.core.ground.extras import require


def test_an_installed_package_is_returned():
    assert require("torch", extra="all") is torch


def test_a_missing_package_names_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(ImportError, match=r'pip install "neurms\[lightning\]"') as caught:
        require("lightning", extra="lightning")
    assert caught.value.name == "lightning"


def test_a_broken_package_raises_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency") as caught:
        require("broken_package", extra="lightning")
    assert "pip install" not in str(caught.value)
