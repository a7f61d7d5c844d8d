"""What is installed, found and wrong, in one screen, with what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from autoembed import __version__, settings
from autoembed.errors import AutoembedError
from autoembed.models import directory as model_directory
from autoembed.models.model import Entry
from autoembed.process import cpu, device

OK, WARNING, WRONG, INFO = "ok", "warning", "WRONG", ""
PACKAGES = ("torch", "sentence-transformers", "transformers", "tokenizers", "safetensors", "numpy", "orjson")
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16")
EXTENSIONS = (
    ("vector", WRONG, "Install pgvector 0.7 or newer for this PostgreSQL."),
    ("plpython3u", WRONG, "Install PL/Python for this PostgreSQL (Debian: postgresql-plpython3-NN)."),
    ("pg_autoembed", WRONG, "Run `make install` with this PG_CONFIG."),
    ("pg_cron", INFO, ""),
)


@dataclass(frozen=True)
class Check:
    section: str
    status: str
    text: str
    advice: str = ""


def examine(environ: Mapping[str, str] = os.environ) -> list[Check]:
    return [*_versions(), *_computing(environ), *_settings(environ), *_models(environ), *_postgres(environ)]


def is_ill(checks: Iterable[Check]) -> bool:
    return any(check.status == WRONG for check in checks)


def render(checks: Iterable[Check]) -> str:
    lines: list[str] = []
    section = ""
    for check in checks:
        if check.section != section:
            section = check.section
            lines.append(section)
        lines.append(f"  {check.status:<8}{check.text}")
        if check.advice:
            lines.append(f"          -> {check.advice}")
    return "\n".join(lines)


def _versions() -> list[Check]:
    checks = [Check("Versions", INFO, f"autoembed {__version__}, Python {platform.python_version()}")]
    return checks + [_version(package) for package in PACKAGES]


def _version(package: str) -> Check:
    try:
        return Check("Versions", OK, f"{package} {importlib.metadata.version(package)}")
    except importlib.metadata.PackageNotFoundError:
        return Check("Versions", WRONG, f"{package} is not installed", "Run `make install`.")


def _computing(environ: Mapping[str, str]) -> list[Check]:
    flags = cpu_flags()
    checks = [Check("Computing", INFO, f"CPU: {os.cpu_count()} cores, {' '.join(flags) or 'no flags of interest'}")]
    try:
        import torch
    except ImportError as error:
        return [*checks, Check("Computing", WRONG, f"torch cannot be imported: {error}", "Run `make install`.")]
    checks.append(Check("Computing", INFO, f"torch uses {torch.get_num_threads()} threads"))
    found = re.search(r"BLAS_INFO=(\w+)", torch._C._show_config())
    blas = cpu.blas() or (found[1] if found else "unknown")
    return [*checks, _blas(blas, cpu.matmul_gflops()), _device(environ)]


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Those that decide which precision is fast."""
    try:
        found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return []
    have = set(found[1].split()) if found else set()
    return [flag for flag in CPU_FLAGS if flag in have]


def _blas(name: str, gflops: float) -> Check:
    text = f"BLAS: {name}, float32 products at {gflops:.0f} GFLOP/s"
    if gflops < cpu.SLOW_GFLOPS:
        return Check("Computing", WARNING, text, cpu.BLAS_HINT)
    if "openblas-pthread" in name:
        advice = "EMBEDDING_THREADS does not limit this one's threads. Debian: libopenblas0-openmp instead."
        return Check("Computing", WARNING, text, advice)
    return Check("Computing", OK, text)


def _device(environ: Mapping[str, str]) -> Check:
    try:
        wanted = settings.read(environ).device
        found = device.resolve(wanted)
    except AutoembedError as error:
        return Check("Computing", WRONG, str(error), error.hint or "")
    return Check("Computing", OK, f"device: {device.describe(found)} (EMBEDDING_DEVICE is {wanted})")


def _settings(environ: Mapping[str, str]) -> list[Check]:
    """The environment of this command; the server's own is what the view embedding_settings shows."""
    title = "Settings (of this command; the server's: select * from embedding_settings)"
    rows = settings.report(environ)
    unset = [name for name, _, source in rows if source == "default"]
    checks = [_setting(title, *row) for row in rows if row[0] not in unset]
    checks += [
        Check(title, WARNING, f"{name} is not a setting", "Check the spelling.") for name in settings.unknown(environ)
    ]
    return [*checks, Check(title, INFO, f"at their defaults: {len(unset)} of {len(rows)}")]


def _setting(title: str, name: str, value: str | None, source: str) -> Check:
    if source.startswith("invalid: "):
        return Check(title, WRONG, source.removeprefix("invalid: "), f"Change or unset {name}.")
    return Check(title, OK, f"{name} = {value} ({source})")


def _models(environ: Mapping[str, str]) -> list[Check]:
    try:
        current = settings.read(environ)
        entries = model_directory.catalog(current)
    except AutoembedError as error:
        return [Check("Models", WRONG, str(error), error.hint or "")]
    directory = current.model_dir
    add = f"autoembed model add PATH (or model pull NAME) --dir {directory}"
    if not entries:
        return [Check("Models", WRONG, f"{directory} has no model", add)]
    checks = [Check("Models", INFO, f"directory {directory}"), *_reachable(directory), *map(_model, entries)]
    wrong = [Check("Models", WRONG, f"EMBEDDING_PRELOAD: {error}", error.hint or "") for error in _missing(environ)]
    return [*checks, _default_model(current), *wrong]


def _reachable(directory: Path) -> list[Check]:
    """The server's user is another one: it needs to pass all folders above."""
    closed = [folder for folder in (directory, *directory.parents) if not folder.stat().st_mode & 0o001]
    advice = "The server's user must be able to get there: chmod o+x, or another EMBEDDING_MODEL_DIR."
    return [Check("Models", WARNING, f"{folder} is closed to other users", advice) for folder in closed]


def _model(entry: Entry) -> Check:
    if entry.status == "ready":
        facts = f"{entry.architecture}, {entry.dimensions} dimensions, {entry.max_tokens} tokens"
        return Check("Models", OK, f"{entry.name}: ready, {facts}, {entry.note}")
    if entry.status == "unregistered":
        return Check("Models", WARNING, f"{entry.name}: unregistered", f"autoembed model add {entry.name} ...")
    return Check("Models", WRONG, f"{entry.name}: {entry.status}", "Add it again with --force, or remove it.")


def _default_model(current: settings.Settings) -> Check:
    try:
        return Check("Models", OK, f"the default model is {model_directory.find(current).name}")
    except AutoembedError as error:
        return Check("Models", WARNING, f"no default model: {error}", error.hint or "")


def _missing(environ: Mapping[str, str]) -> list[AutoembedError]:
    """What is wrong with the models that are to be preloaded."""
    found = []
    for name in settings.preload_names(environ):
        try:
            model_directory.find(settings.read(environ), name)
        except AutoembedError as error:
            found.append(error)
    return found


def _postgres(environ: Mapping[str, str]) -> list[Check]:
    program = environ.get("PG_CONFIG") or shutil.which("pg_config")
    ask = None if program is None else _asker(program)
    version = ask("--version") if ask else None
    if ask is None or version is None:
        return [Check("PostgreSQL", WRONG, "pg_config was not found", "Install PostgreSQL, or set PG_CONFIG.")]
    folder = Path(ask("--sharedir") or "") / "extension"
    checks = [Check("PostgreSQL", OK, f"{version} ({program})")]
    checks += [_extension(folder, name, status, advice) for name, status, advice in EXTENSIONS]
    libraries = Path(ask("--pkglibdir") or "")
    return [*checks, _site(libraries / "pg_autoembed" / __version__), _library(libraries), *_servers()]


def _asker(program: str) -> Callable[[str], str | None]:
    def ask(option: str) -> str | None:
        try:
            answer = subprocess.run([program, option], capture_output=True, text=True, check=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            return None
        return answer.stdout.strip()

    return ask


def _extension(folder: Path, name: str, missing: str, advice: str) -> Check:
    try:
        control = (folder / f"{name}.control").read_text(encoding="utf-8")
    except OSError:
        return Check(
            "PostgreSQL", missing, f"extension {name} is not available{' (optional)' if not advice else ''}", advice
        )
    version = re.search(r"^default_version\s*=\s*'([^']*)'", control, re.MULTILINE)
    return Check("PostgreSQL", OK, f"extension {name} {version[1] if version else ''}".rstrip())


def _site(site: Path) -> Check:
    if site.is_dir():
        return Check("PostgreSQL", OK, f"Python packages for the server in {site}")
    return Check("PostgreSQL", WRONG, f"no Python packages for the server in {site}", "Run `make install`.")


def _library(libraries: Path) -> Check:
    if (libraries / "autoembed_preload.so").is_file():
        return Check("PostgreSQL", OK, "library autoembed_preload, for shared_preload_libraries")
    text = "library autoembed_preload is not installed: each session loads its own models"
    return Check("PostgreSQL", WARNING, text, "Run `make install`.")


def _servers(processes: Path = Path("/proc")) -> list[Check]:
    """The servers of this machine that this command's user may look into: what they preload."""
    found = []
    for process in sorted(processes.glob("[0-9]*"), key=lambda process: int(process.name)):
        try:
            if _is_postmaster(process):
                found.append(_server(process))
        except OSError:
            continue
    return found


def _is_postmaster(process: Path) -> bool:
    if _program(process) != "postgres":
        return False
    parent = re.search(r"^PPid:\s*(\d+)$", (process / "status").read_text(encoding="utf-8"), re.MULTILINE)
    return parent is not None and _program(process.parent / parent[1]) != "postgres"


def _program(process: Path) -> str:
    try:
        return (process / "exe").readlink().name
    except OSError:  # another user's
        return ""


def _environment(process: Path) -> dict[str, str]:
    """As it was when the process started."""
    variables = (process / "environ").read_text(encoding="utf-8", errors="replace").split("\0")
    return {name: value for name, _, value in (variable.partition("=") for variable in variables) if name}


def _server(process: Path) -> Check:
    libraries = (process / "maps").read_text(encoding="utf-8")
    threads = len(list((process / "task").iterdir()))
    text = f"server in {(process / 'cwd').readlink()}"
    if "/autoembed_preload.so" not in libraries:
        return Check("PostgreSQL", INFO, f"{text}: preloads no models")
    environment = _environment(process)
    if missing := _missing(environment):
        errors = "; ".join(map(str, missing))
        return Check(
            "PostgreSQL", WRONG, f"{text}: EMBEDDING_PRELOAD of its environment: {errors}", missing[0].hint or ""
        )
    if "/libtorch" not in libraries:
        advice = "Its log says why. EMBEDDING_PRELOAD in its environment names the models."
        return Check("PostgreSQL", WARNING, f"{text}: has autoembed_preload, but no model is preloaded", advice)
    if threads > 1:
        advice = "Its sessions may hang when they embed: find the library that starts threads when it is loaded."
        return Check(
            "PostgreSQL", WARNING, f"{text}: preloads models, but its postmaster has {threads} threads", advice
        )
    wanted = ", ".join(settings.preload_names(environment))
    return Check(
        "PostgreSQL", OK, f"{text}: preloads models ({wanted}); the view embedding_settings says what came of them"
    )
