"""What is installed, found and wrong, in one screen, with what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from autoembed import __version__, settings
from autoembed.errors import AutoembedError
from autoembed.models import directory as model_directory
from autoembed.models.model import Entry
from autoembed.process import cpu, device

OK, WARNING, WRONG, INFO = "ok", "warning", "WRONG", ""
PACKAGES = ("torch", "sentence-transformers", "transformers", "tokenizers", "safetensors", "numpy", "orjson")
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16")
GIB = 1 << 30
EXTENSIONS = (
    ("vector", WRONG, "Install pgvector 0.7 or newer for this PostgreSQL."),
    ("plpython3u", WRONG, "Install PL/Python for this PostgreSQL (Debian: postgresql-plpython3-NN)."),
    ("pg_autoembed", WRONG, "Run `make install` with this PG_CONFIG."),
    ("pg_cron", INFO, ""),
)


@dataclass(frozen=True)
class Finding:
    section: str
    status: str
    text: str
    advice: str = ""


def examine(environ: Mapping[str, str] = os.environ) -> list[Finding]:
    return [*_versions(), *_computing(environ), *_settings(environ), *_models(environ), *_postgres(environ)]


def is_ill(findings: Iterable[Finding]) -> bool:
    return any(finding.status == WRONG for finding in findings)


def render(findings: Iterable[Finding]) -> str:
    lines: list[str] = []
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            lines.append(section)
        lines.append(f"  {finding.status:<8}{finding.text}")
        if finding.advice:
            lines.append(f"          -> {finding.advice}")
    return "\n".join(lines)


def _versions() -> list[Finding]:
    findings = [Finding("Versions", INFO, f"autoembed {__version__}, Python {platform.python_version()}")]
    return findings + [_version(package) for package in PACKAGES]


def _version(package: str) -> Finding:
    try:
        return Finding("Versions", OK, f"{package} {importlib.metadata.version(package)}")
    except importlib.metadata.PackageNotFoundError:
        return Finding("Versions", WRONG, f"{package} is not installed", "Run `make install`.")


def _computing(environ: Mapping[str, str]) -> list[Finding]:
    flags = [flag for flag in CPU_FLAGS if flag in cpu.flags()]
    cores = f"{psutil.cpu_count(logical=False) or '?'} cores, {psutil.cpu_count()} threads"
    memory = psutil.virtual_memory()
    findings = [
        Finding("Computing", INFO, f"CPU: {cores}, {' '.join(flags) or 'no flags of interest'}"),
        Finding("Computing", INFO, f"memory: {memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB available"),
    ]
    try:
        import torch
    except ImportError as error:
        return [*findings, Finding("Computing", WRONG, f"torch cannot be imported: {error}", "Run `make install`.")]
    findings.append(Finding("Computing", INFO, f"torch uses {torch.get_num_threads()} threads"))
    return [*findings, _blas(cpu.blas(), cpu.matmul_gflops()), _device(environ)]


def _blas(name: str, gflops: float) -> Finding:
    text = f"BLAS: {name}, float32 products at {gflops:.0f} GFLOP/s"
    if gflops < cpu.SLOW_GFLOPS:
        return Finding("Computing", WARNING, text, cpu.BLAS_HINT)
    return Finding("Computing", OK, text)


def _device(environ: Mapping[str, str]) -> Finding:
    try:
        wanted = settings.read(environ).device
        found = device.resolve(wanted)
    except AutoembedError as error:
        return Finding("Computing", WRONG, str(error), error.hint or "")
    return Finding("Computing", OK, f"device: {device.name_of(found)} (EMBEDDING_DEVICE is {wanted})")


def _settings(environ: Mapping[str, str]) -> list[Finding]:
    """Reports this command's environment; the server's own is what the view embedding_settings shows."""
    title = "Settings (of this command; the server's: select * from embedding_settings)"
    rows = settings.report(environ)
    unset = [name for name, _, source in rows if source == "default"]
    findings = [_setting(title, *row) for row in rows if row[0] not in unset]
    return [*findings, Finding(title, INFO, f"at their defaults: {len(unset)} of {len(settings.VARIABLES)}")]


def _setting(title: str, name: str, value: str | None, source: str) -> Finding:
    if source == settings.NO_SETTING:
        return Finding(title, WARNING, f"{name} is {source}", "Check the spelling.")
    if source.startswith("invalid: "):
        return Finding(title, WRONG, source.removeprefix("invalid: "), f"Change or unset {name}.")
    return Finding(title, OK, f"{name} = {value} ({source})")


def _models(environ: Mapping[str, str]) -> list[Finding]:
    try:
        current = settings.read(environ)
        entries = model_directory.catalog(current)
    except AutoembedError as error:
        return [Finding("Models", WRONG, str(error), error.hint or "")]
    directory = current.model_dir
    add = f"autoembed model add PATH (or model pull NAME) --dir {directory}"
    if not entries:
        return [Finding("Models", WRONG, f"{directory} has no model", add)]
    findings = [Finding("Models", INFO, f"directory {directory}"), *_reachable(directory), *map(_model, entries)]
    wrong = [Finding("Models", WRONG, f"EMBEDDING_PRELOAD: {error}", error.hint or "") for error in _missing(environ)]
    return [*findings, _default_model(current), *wrong]


def _reachable(directory: Path) -> list[Finding]:
    """Looks at the folders above: the server's user is another one, and needs to pass all of them."""
    closed = [folder for folder in (directory, *directory.parents) if not folder.stat().st_mode & 0o001]
    advice = "The server's user must be able to get there: chmod o+x, or another EMBEDDING_MODEL_DIR."
    return [Finding("Models", WARNING, f"{folder} is closed to other users", advice) for folder in closed]


def _model(entry: Entry) -> Finding:
    if entry.status == "ready":
        facts = f"{entry.architecture}, {entry.dimensions} dimensions, {entry.max_tokens} tokens"
        return Finding("Models", OK, f"{entry.name}: ready, {facts}, {entry.note}")
    if entry.status == "unregistered":
        return Finding("Models", WARNING, f"{entry.name}: unregistered", f"autoembed model add {entry.name} ...")
    return Finding("Models", WRONG, f"{entry.name}: {entry.status}", "Add it again with --force, or remove it.")


def _default_model(current: settings.Settings) -> Finding:
    try:
        return Finding("Models", OK, f"the default model is {model_directory.find(current).name}")
    except AutoembedError as error:
        return Finding("Models", WARNING, f"no default model: {error}", error.hint or "")


def _missing(environ: Mapping[str, str]) -> list[AutoembedError]:
    """Returns what is wrong with the models that are to be preloaded."""
    found = []
    for name in settings.preload_names(environ):
        try:
            model_directory.find(settings.read(environ), name)
        except AutoembedError as error:
            found.append(error)
    return found


def _postgres(environ: Mapping[str, str]) -> list[Finding]:
    program = environ.get("PG_CONFIG") or shutil.which("pg_config")
    ask = None if program is None else _asker(program)
    version = ask("--version") if ask else None
    if ask is None or version is None:
        return [Finding("PostgreSQL", WRONG, "pg_config was not found", "Install PostgreSQL, or set PG_CONFIG.")]
    folder = Path(ask("--sharedir") or "") / "extension"
    findings = [Finding("PostgreSQL", OK, f"{version} ({program})")]
    findings += [_extension(folder, name, status, advice) for name, status, advice in EXTENSIONS]
    libraries = Path(ask("--pkglibdir") or "")
    return [*findings, _site(libraries / "pg_autoembed" / __version__), _library(libraries), *_servers()]


def _asker(program: str) -> Callable[[str], str | None]:
    def ask(option: str) -> str | None:
        try:
            answer = subprocess.run([program, option], capture_output=True, text=True, check=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            return None
        return answer.stdout.strip()

    return ask


def _extension(folder: Path, name: str, missing: str, advice: str) -> Finding:
    try:
        control = (folder / f"{name}.control").read_text(encoding="utf-8")
    except OSError:
        return Finding(
            "PostgreSQL", missing, f"extension {name} is not available{' (optional)' if not advice else ''}", advice
        )
    version = re.search(r"^default_version\s*=\s*'([^']*)'", control, re.MULTILINE)
    return Finding("PostgreSQL", OK, f"extension {name} {version[1] if version else ''}".rstrip())


def _site(site: Path) -> Finding:
    if site.is_dir():
        return Finding("PostgreSQL", OK, f"Python packages for the server in {site}")
    return Finding("PostgreSQL", WRONG, f"no Python packages for the server in {site}", "Run `make install`.")


def _library(libraries: Path) -> Finding:
    if (libraries / "autoembed_preload.so").is_file():
        return Finding("PostgreSQL", OK, "library autoembed_preload, for shared_preload_libraries")
    text = "library autoembed_preload is not installed: each session loads its own models"
    return Finding("PostgreSQL", WARNING, text, "Run `make install`.")


def _servers() -> list[Finding]:
    """Reports what the servers of this machine preload, as far as this command's user may look into them."""
    found = []
    for process in sorted(psutil.process_iter(), key=lambda process: process.pid):
        with suppress(psutil.Error, OSError):
            if _is_postmaster(process):
                found.append(_server(process))
    return found


def _is_postmaster(process: psutil.Process) -> bool:
    if _program(process) != "postgres":
        return False
    parent = process.parent()
    return parent is None or _program(parent) != "postgres"


def _program(process: psutil.Process) -> str:
    try:
        return Path(process.exe()).name
    except psutil.Error:  # another user's
        return ""


def _server(process: psutil.Process) -> Finding:
    libraries = " ".join(mapped.path for mapped in process.memory_maps())
    threads, environment = process.num_threads(), process.environ()
    text = f"server in {process.cwd()}"
    if "/autoembed_preload.so" not in libraries:
        return Finding("PostgreSQL", INFO, f"{text}: preloads no models")
    if missing := _missing(environment):
        errors = "; ".join(map(str, missing))
        return Finding(
            "PostgreSQL", WRONG, f"{text}: EMBEDDING_PRELOAD of its environment: {errors}", missing[0].hint or ""
        )
    if "/libtorch" not in libraries:
        advice = "Its log says why. EMBEDDING_PRELOAD in its environment names the models."
        return Finding("PostgreSQL", WARNING, f"{text}: has autoembed_preload, but no model is preloaded", advice)
    if threads > 1:
        advice = "Its sessions may hang when they embed: find the library that starts threads when it is loaded."
        return Finding(
            "PostgreSQL", WARNING, f"{text}: preloads models, but its postmaster has {threads} threads", advice
        )
    wanted = ", ".join(settings.preload_names(environment))
    return Finding(
        "PostgreSQL", OK, f"{text}: preloads models ({wanted}); the view embedding_settings says what came of them"
    )
