"""What reaches SQL is ASCII: a database's encoding may hold nothing else."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SQL = sorted([*ROOT.glob("sql/**/*.sql"), ROOT / "pg_autoembed.control"])
PACKAGE = ROOT / "plpython" / "autoembed"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent.name != "adding")
"""Of `adding`, which never runs in a server, the texts of a trial are in many scripts."""


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.mark.parametrize("path", SQL, ids=names(SQL))
def test_scripts_are_ascii(path: Path) -> None:
    """Comments as well: CREATE EXTENSION converts the whole script."""
    odd = [line for line in path.read_text("utf-8").splitlines() if not line.isascii()]
    assert odd == []


@pytest.mark.parametrize("path", MODULES, ids=names(MODULES))
def test_messages_are_ascii(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert [text for text in texts if not text.isascii()] == []


def test_there_is_something_to_look_at() -> None:
    assert len(SQL) > 20
    assert len(MODULES) > 40
