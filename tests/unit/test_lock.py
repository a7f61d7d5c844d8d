"""constraints.txt: one version of every package, for every Python that the product runs on."""

from __future__ import annotations

import platform
import tomllib
from collections import Counter
from importlib.metadata import distributions
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
UNLOCKED = {"torch", "sympy", "autoembed", "pip", "setuptools"}
"""torch is pinned in the Makefile, and sympy by torch; the others come with the product or with the venv."""


def required() -> list[Requirement]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(each) for each in chain.from_iterable(lists)]


def locked(python: str) -> dict[str, str]:
    """Version by package, for one version of Python, as 3.11.2."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    environment = {"python_version": python.rpartition(".")[0], "python_full_version": python}
    wanted = [pin for pin in pins if pin.marker is None or pin.marker.evaluate(environment)]
    assert max(Counter(pin.name for pin in wanted).values()) == 1
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in wanted}


@pytest.mark.parametrize("python", ["3.11.2", "3.11.9", "3.12.3", "3.13.5", "3.14.0"])
def test_all_that_is_required_is_locked(python: str) -> None:
    versions = locked(python)
    for requirement in required():
        if requirement.name != "torch":
            assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


def test_what_is_installed_is_what_is_locked() -> None:
    """And so a machine's tests are the tests of every machine."""
    versions = locked(platform.python_version())
    installed = {canonicalize_name(each.metadata["Name"]): each.version for each in distributions()}
    assert {name: version for name, version in installed.items() if name not in UNLOCKED} == {
        name: versions.get(name) for name in installed.keys() - UNLOCKED
    }
