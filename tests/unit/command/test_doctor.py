from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

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


def test_a_blas_with_threads_of_its_own_is_a_warning() -> None:
    own = doctor._blas("/usr/lib/openblas-pthread/libblas.so.3", 190)
    assert own.status == WARNING
    assert "EMBEDDING_THREADS" in own.advice
    assert doctor._blas("/usr/lib/openblas-openmp/libblas.so.3", 190).status == OK


def test_the_blas_is_the_one_that_is_loaded(tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    maps.write_text("7f-80 r-xp 0 08:01 7 /usr/lib/python3/libx.so\n81-82 r-xp 0 08:01 8 /usr/lib/blas/libblas.so.3\n")
    assert cpu.blas(maps) == "/usr/lib/blas/libblas.so.3"
    maps.write_text("7f-80 r-xp 0 08:01 7 /usr/lib/python3/libx.so\n")
    assert cpu.blas(maps) is None


def test_a_device_that_is_not_there(environ: dict[str, str]) -> None:
    assert doctor._device(environ).status == OK
    assert doctor._device(environ | {"EMBEDDING_DEVICE": "mps"}).status == WRONG


def test_cpu_flags(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nflags\t\t: fpu avx2 avx512_bf16 amx_bf16\n\nprocessor : 1\n")
    assert doctor.cpu_flags(info) == ["avx2", "avx512_bf16", "amx_bf16"]
    info.write_text("nothing")
    assert doctor.cpu_flags(info) == []
    assert doctor.cpu_flags(tmp_path / "missing") == []


def test_the_commands_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for status, code in ((OK, 0), (WARNING, 0), (WRONG, 1)):
        monkeypatch.setattr(doctor, "examine", lambda status=status: [Finding("S", status, "text", "advice")])
        assert cli.main(["doctor"]) == code
        assert f"  {status:<8}text\n          -> advice" in capsys.readouterr().out


def process(
    folder: Path, parent: int, program: str = "/usr/bin/postgres", maps: str = "", threads: int = 1, environ: str = ""
) -> None:
    """What /proc says of one."""
    folder.mkdir(parents=True)
    (folder / "exe").symlink_to(program)
    (folder / "cwd").symlink_to("/data")
    (folder / "status").write_text(f"Name:\tpostgres\nPPid:\t{parent}\n")
    (folder / "maps").write_text(maps)
    (folder / "environ").write_text(environ)
    for thread in range(threads):
        (folder / "task" / str(thread)).mkdir(parents=True)


@pytest.mark.parametrize(
    ("libraries", "threads", "status", "words"),
    [
        ("", 1, INFO, "preloads no models"),
        ("/lib/autoembed_preload.so", 1, WARNING, "no model is preloaded"),
        ("/lib/autoembed_preload.so /lib/libtorch_cpu.so", 2, WARNING, "has 2 threads"),
        ("/lib/autoembed_preload.so /lib/libtorch_cpu.so", 1, OK, "preloads models"),
    ],
)
def test_what_a_running_server_preloads(tmp_path: Path, libraries: str, threads: int, status: str, words: str) -> None:
    process(tmp_path / "1", 0, program="/sbin/init")
    process(tmp_path / "7", 1, maps=libraries, threads=threads)
    process(tmp_path / "8", 7)
    (check,) = doctor._servers(tmp_path)
    assert check.status == status
    assert words in check.text


def test_what_a_running_server_was_to_preload(tmp_path: Path, shelf: Settings) -> None:
    """By its own environment, not by this command's."""
    variables = {"EMBEDDING_MODEL_DIR": str(shelf.model_dir), "EMBEDDING_PRELOAD": "no-such,all-MiniLM-L6-v2"}
    environ = "".join(f"{name}={value}\0" for name, value in variables.items())
    process(tmp_path / "1", 0, program="/sbin/init")
    process(tmp_path / "7", 1, maps="/lib/autoembed_preload.so /lib/libtorch_cpu.so", environ=environ)
    (check,) = doctor._servers(tmp_path)
    assert check.status == WRONG
    assert check.text.startswith('server in /data: EMBEDDING_PRELOAD of its environment: model "no-such" is not in')
    environ = environ.replace("no-such,", "")
    process(tmp_path / "9", 1, maps="/lib/autoembed_preload.so", environ=environ)
    assert texts(doctor._servers(tmp_path), WARNING).startswith("server in /data: has autoembed_preload, but no model")
    process(tmp_path / "11", 1, maps="/lib/autoembed_preload.so /lib/libtorch_cpu.so", environ=environ)
    assert texts(doctor._servers(tmp_path), OK).startswith("server in /data: preloads models (all-MiniLM-L6-v2);")
