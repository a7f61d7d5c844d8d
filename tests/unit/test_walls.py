"""The walls between the package's rooms: each is broken once, in a copy, and lint-imports sees it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STOREYS = "No room imports from above or from beside"
ENCODERS = "Only encoding.load knows both encoders"
UPWARDS = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import "

BREAKS = [
    # who imports; what; the wall that it breaks
    ("server/session.py", "autoembed.adding.hub", "The server neither downloads nor unpickles"),
    ("server/health.py", "autoembed.command.doctor", STOREYS),
    ("command/cli.py", "autoembed.server.session", STOREYS),
    ("filling/fill.py", "autoembed.server.database", STOREYS),
    ("filling/worker.py", "autoembed.adding.add", STOREYS),
    (
        "filling/records.py",
        "autoembed.models.directory",
        "A fill is handed its encoders and looks into no model's folder",
    ),
    ("adding/add.py", "autoembed.server.session", STOREYS),
    ("adding/convert.py", "autoembed.filling.fill", STOREYS),
    ("encoding/batching.py", "autoembed.filling.records", STOREYS),
    ("encoding/load.py", "autoembed.server.loaded_models", STOREYS),
    ("encoding/packed/encoder.py", "autoembed.encoding.reference", ENCODERS),
    ("encoding/reference.py", "autoembed.encoding.packed.encoder", ENCODERS),
    ("encoding/protocol.py", "autoembed.encoding.load", ENCODERS),
    ("models/directory.py", "autoembed.encoding.load", STOREYS),
    ("models/manifest.py", "autoembed.server.status_file", STOREYS),
    ("models/layout.py", "autoembed.process.memory", "What stands in a model's folder does not depend on the machine"),
    ("process/device.py", "autoembed.settings", STOREYS),
    ("process/threads.py", "autoembed.models.model", STOREYS),
    ("settings.py", "autoembed.process.cpu", STOREYS),
    ("errors.py", "autoembed.settings", STOREYS),
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("walls")
    shutil.copytree(ROOT / "plpython" / "autoembed", directory / "autoembed", ignore=shutil.ignore_patterns("*.so"))
    shutil.copy(ROOT / "pyproject.toml", directory)
    return directory


def broken(directory: Path) -> set[str]:
    """Returns the names of the walls that lint-imports finds broken."""
    lint = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--config", "pyproject.toml"]
    done = subprocess.run(lint, cwd=directory, env={"PYTHONPATH": "."}, capture_output=True, text=True, check=False)
    names = {line.removesuffix(" BROKEN") for line in done.stdout.splitlines() if line.endswith(" BROKEN")}
    assert (done.returncode == 0) == (not names), done.stdout + done.stderr
    assert "Contracts:" in done.stdout, done.stdout + done.stderr
    return names


def test_all_walls_stand(copy: Path) -> None:
    assert broken(copy) == set()


@pytest.mark.parametrize(("importer", "imported", "wall"), BREAKS, ids=lambda value: value.removeprefix("autoembed."))
def test_wall_is_seen_broken(copy: Path, importer: str, imported: str, wall: str) -> None:
    """An import for type checking alone is enough."""
    module = copy / "autoembed" / importer
    whole = module.read_text()
    module.write_text(f"{whole}\n{UPWARDS}{imported}\n")
    try:
        assert wall in broken(copy)
    finally:
        module.write_text(whole)


def test_new_room_must_be_given_its_place(copy: Path) -> None:
    room = copy / "autoembed" / "attic"
    room.mkdir()
    (room / "__init__.py").touch()
    try:
        assert broken(copy) == {STOREYS}
    finally:
        shutil.rmtree(room)
