"""Without PyTorch everything but networks works, and asking for a network says what to install."""

import importlib
import sys

import pytest

from cohortium.core.errors import StudyError


def test_importing_fedavg_says_how_to_install_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "cohortium.learning.fedavg", raising=False)
    with pytest.raises(StudyError, match=r"needs PyTorch.*pip install 'cohortium\[torch\]'"):
        importlib.import_module("cohortium.learning.fedavg")


@pytest.mark.parametrize("name", ["algorithm", "network", "server"])
def test_the_rest_needs_no_torch(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, f"cohortium.learning.{name}", raising=False)
    importlib.import_module(f"cohortium.learning.{name}")
