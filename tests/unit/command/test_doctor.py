from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from autoembed.command import cli, doctor
from autoembed.command.doctor import INFO, OK, WARNING, WRONG, Finding
from autoembed.process import cpu
from autoembed.settings import Settings


@pytest.fixture
def environ(shelf: Settings, fake_postgres: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setattr(doctor, "_servers", list)  # those of this machine may be many
    return {"EMBEDDING_MODEL_DIR": str(shelf.model_dir), "EMBEDDING_DEVICE": "cpu", "PG_CONFIG": str(fake_postgres)}


@pytest.fixture
def fake_postgres(tmp_path: Path) -> Path:
    """A pg_config whose PostgreSQL has everything but pg_cron."""
    extensions = tmp_path / "share" / "extension"
    extensions.mkdir(parents=True)
    for name in ("vector", "plpython3u", "pg_autoembed"):
        (extensions / f"{name}.control").write_text("comment = 'x'\ndefault_version = '1.2'\n")
    (tmp_path / "lib" / "pg_autoembed" / "0.1.0").mkdir(parents=True)
    program = tmp_path / "pg_config"
    program.write_text(
        "#!/bin/sh\n"
        "case $1 in --version) echo PostgreSQL 15.0;; "
        f'--sharedir) echo "{tmp_path}/share";; *) echo "{tmp_path}/lib";; esac\n'
    )
    program.chmod(0o755)
    return program


def texts(checks: list[Finding], status: str) -> str:
    return "\n".join(f"{check.text} -> {check.advice}" for check in checks if check.status == status)


def test_a_healthy_machine_fits_on_one_screen(environ: dict[str, str]) -> None:
    checks = doctor.examine(environ)
    assert not doctor.is_ill(checks), texts(checks, WRONG)
    screen = doctor.render(checks)
    assert len(screen.splitlines()) <= 50
    for words in (
        f"torch {version('torch')}",
        "GFLOP/s",
        "device: cpu",
        "all-MiniLM-L6-v2: ready",
        "PostgreSQL 15.0",
        "extension vector 1.2",
    ):
        assert words in screen
    assert "extension pg_cron is not available (optional)" in screen


def test_a_wrong_setting_is_marked_with_what_to_do(environ: dict[str, str]) -> None:
    checks = doctor.examine(environ | {"EMBEDDING_THREADS": "all", "EMBEDDING_MODEL": "x"})
    assert doctor.is_ill(checks)
    assert "Change or unset EMBEDDING_THREADS" in texts(checks, WRONG)
    assert "EMBEDDING_MODEL is not a setting" in texts(checks, WARNING)
    assert "WRONG   EMBEDDING_THREADS must be a whole number" in doctor.render(checks)


def test_no_models(environ: dict[str, str], tmp_path: Path) -> None:
    found = texts(doctor._models(environ | {"EMBEDDING_MODEL_DIR": str(tmp_path / "none")}), WRONG)
    assert "has no model" in found
    assert "model add PATH" in found


def test_models_that_cannot_be_used(environ: dict[str, str], own_shelf: Settings) -> None:
    directory = own_shelf.model_dir
    (directory / "raw").mkdir()
    (directory / "tiny-mpnet" / "vocab.txt").unlink()
    directory.chmod(0o750)
    checks = doctor._models(environ | {"EMBEDDING_MODEL_DIR": str(directory)})
    assert "tiny-mpnet: broken: " in texts(checks, WRONG)
    assert "raw: unregistered" in texts(checks, WARNING)
    assert f"{directory} is closed to other users" in texts(checks, WARNING)
    assert "no default model: " in texts(checks, WARNING)


def test_preloading_a_model_that_is_not_there(environ: dict[str, str]) -> None:
    found = texts(doctor._models(environ | {"EMBEDDING_PRELOAD": "all-MiniLM-L6-v2, no-such"}), WRONG)
    assert found.startswith('EMBEDDING_PRELOAD: model "no-such" is not in the model directory')
    assert "There are: " in found
    assert texts(doctor._models(environ | {"EMBEDDING_PRELOAD": "all-MiniLM-L6-v2"}), WRONG) == ""


def test_no_postgres(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "set PG_CONFIG" in texts(doctor._postgres(environ | {"PG_CONFIG": "/nowhere/pg_config"}), WRONG)
    monkeypatch.setenv("PATH", "/nowhere")
    assert "set PG_CONFIG" in texts(doctor._postgres({}), WRONG)


def test_what_postgres_lacks(environ: dict[str, str], fake_postgres: Path) -> None:
    (fake_postgres.parent / "share" / "extension" / "vector.control").unlink()
    (fake_postgres.parent / "lib" / "pg_autoembed" / "0.1.0").rmdir()
    found = texts(doctor._postgres(environ), WRONG)
    assert "extension vector is not available -> Install pgvector" in found
    assert "no Python packages for the server" in found


def test_a_missing_package() -> None:
    assert doctor._version("no-such-package") == Finding(
        "Versions", WRONG, "no-such-package is not installed", "Run `make install`."
    )


def test_a_reference_blas_is_a_warning() -> None:
    slow = doctor._blas("/usr/lib/blas/libblas.so.3.12.1", 2.6)
    assert (slow.status, slow.advice) == (WARNING, cpu.BLAS_HINT)
    assert doctor._blas("mkl", 190).status == OK


def test_the_machine_is_there(environ: dict[str, str]) -> None:
    found = texts(doctor._computing(environ), INFO)
    assert re.search(r"^CPU: (\d+|\?) cores, \d+ threads, ", found, re.MULTILINE)
    assert re.search(r"^memory: \d+\.\d of \d+\.\d GiB available", found, re.MULTILINE)


def test_the_blas_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy's own is not torch's."""
    assert cpu.blas() == "mkl" if torch.backends.mkl.is_available() else " " in cpu.blas()  # type: ignore[no-untyped-call]
    kind = {"internal_api": "openblas", "version": "0.3.29", "threading_layer": "pthreads", "architecture": "Zen"}
    numpys = SimpleNamespace(prefix="libscipy_openblas", **kind)
    monkeypatch.setattr(cpu, "blas_libraries", lambda: [numpys, SimpleNamespace(prefix="libblas", **kind)])
    assert cpu.blas() == "openblas 0.3.29, pthreads, for Zen"


def test_a_device_that_is_not_there(environ: dict[str, str]) -> None:
    assert doctor._device(environ).status == OK
    assert doctor._device(environ | {"EMBEDDING_DEVICE": "mps"}).status == WRONG


def test_the_commands_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for status, code in ((OK, 0), (WARNING, 0), (WRONG, 1)):
        monkeypatch.setattr(doctor, "examine", lambda status=status: [Finding("S", status, "text", "advice")])
        assert cli.main(["doctor"]) == code
        assert f"  {status:<8}text\n          -> advice" in capsys.readouterr().out


@dataclass
class Process:
    """What psutil says of one."""

    pid: int
    above: Process | None
    program: str = "/usr/bin/postgres"
    maps: str = ""
    threads: int = 1
    variables: dict[str, str] = field(default_factory=dict)

    def parent(self) -> Process | None:
        return self.above

    def exe(self) -> str:
        if self.program == "hidden":
            raise psutil.AccessDenied(self.pid)
        return self.program

    def memory_maps(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(path=path) for path in self.maps.split()]

    def num_threads(self) -> int:
        return self.threads

    def environ(self) -> dict[str, str]:
        return self.variables

    def cwd(self) -> str:
        return "/data"


INIT = Process(1, None, program="/sbin/init")


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Finding]]:
    """servers(process, ...): what the doctor says of a machine with them."""

    def look(*processes: Process) -> list[Finding]:
        children = [Process(each.pid + 1, each) for each in processes]
        hidden = Process(2, INIT, program="hidden")
        monkeypatch.setattr(psutil, "process_iter", lambda: [*children, hidden, *processes, INIT])
        return doctor._servers()

    return look


@pytest.mark.parametrize(
    ("libraries", "threads", "status", "words"),
    [
        ("", 1, INFO, "preloads no models"),
        ("/lib/autoembed_preload.so", 1, WARNING, "no model is preloaded"),
        ("/lib/autoembed_preload.so /lib/libtorch_cpu.so", 2, WARNING, "has 2 threads"),
        ("/lib/autoembed_preload.so /lib/libtorch_cpu.so", 1, OK, "preloads models"),
    ],
)
def test_what_a_running_server_preloads(
    servers: Callable[..., list[Finding]], libraries: str, threads: int, status: str, words: str
) -> None:
    (check,) = servers(Process(7, INIT, maps=libraries, threads=threads))
    assert check.status == status
    assert words in check.text


def test_what_a_running_server_was_to_preload(servers: Callable[..., list[Finding]], shelf: Settings) -> None:
    """By its own environment, not by this command's."""
    variables = {"EMBEDDING_MODEL_DIR": str(shelf.model_dir), "EMBEDDING_PRELOAD": "no-such,all-MiniLM-L6-v2"}
    both = "/lib/autoembed_preload.so /lib/libtorch_cpu.so"
    wrong = Process(7, INIT, maps=both, variables=variables)
    (check,) = servers(wrong)
    assert check.status == WRONG
    assert check.text.startswith('server in /data: EMBEDDING_PRELOAD of its environment: model "no-such" is not in')
    variables = variables | {"EMBEDDING_PRELOAD": "all-MiniLM-L6-v2"}
    failed = Process(9, None, maps="/lib/autoembed_preload.so", variables=variables)  # of a container: no parent
    found = servers(wrong, failed, Process(11, INIT, maps=both, variables=variables))
    assert [check.status for check in found] == [WRONG, WARNING, OK]
    assert found[1].text.startswith("server in /data: has autoembed_preload, but no model")
    assert found[2].text.startswith("server in /data: preloads models (all-MiniLM-L6-v2);")


def test_a_real_process_is_looked_into() -> None:
    me = psutil.Process()
    assert doctor._program(me).startswith("python")
    assert doctor._server(me).text.startswith(f"server in {Path.cwd()}: preloads no models")
