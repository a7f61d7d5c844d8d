"""What the view embedding_health asks of Python: is the default model whole, can it be run, is it preloaded, how fast.

It is read every few seconds, often by a fresh session: so it looks at files and at what is loaded already, hashes
nothing large, and imports no library that runs models.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from autoembed import settings
from autoembed.errors import AutoembedError, MissingPackage, NoDefaultModel
from autoembed.models import directory
from autoembed.models.model import PACKED_ENCODER, Model
from autoembed.process import cpu, device, threads
from autoembed.server import preloaded
from autoembed.settings import Settings

OK, WARN, FAIL = "ok", "warn", "fail"
PACKED_NEEDS = ("torch", "numpy", "safetensors", "tokenizers", "orjson")
SENTENCE_TRANSFORMERS = ("sentence_transformers", "transformers")
SMALL_PRODUCT = 256
"""A product of this size takes under a millisecond, with a reference BLAS fifteen."""
PRELOAD_HINT = (
    "Set shared_preload_libraries = 'autoembed_preload', name the models in EMBEDDING_PRELOAD "
    "in the server's environment, and restart the server."
)


@dataclass(frozen=True)
class Check:
    status: str
    message: str
    hint: str | None = None


def check_all(gd: dict[str, Any], environ: Mapping[str, str] = os.environ) -> dict[str, Check]:
    current, model = default_model(environ)
    return {
        "model": made(check_model, environ),
        "encoder": made(check_encoder, current, model),
        "settings": made(check_settings, environ),
        "device": made(check_device, environ),
        "torch": made(check_torch),
        "preload": made(check_preload, gd, model),
    }


def made(check: Callable[..., Check], *arguments: Any) -> Check:
    """Makes a check; whatever it runs into, the others are made."""
    try:
        return check(*arguments)
    except AutoembedError as error:
        return Check(FAIL, str(error), error.hint)
    except Exception as error:  # noqa: BLE001 -- no cancel comes through here: nothing of this asks the database
        return Check(WARN, f"this check could not be made: {type(error).__name__}")


def default_model(environ: Mapping[str, str]) -> tuple[Settings | None, Model | None]:
    """Returns both as far as there are any; what is wrong with them is for check_model to say."""
    try:
        current = settings.read(environ)
        return current, directory.find(current)
    except AutoembedError:
        return None, None


def check_model(environ: Mapping[str, str]) -> Check:
    current = settings.read(environ)
    try:
        model = directory.find(current)
    except NoDefaultModel as error:
        if current.model_name or not any(entry.status == "ready" for entry in directory.catalog(current)):
            raise
        hint = "Columns keep theirs; who declares or calls embed() names one, or EMBEDDING_MODEL_NAME does."
        return Check(WARN, str(error), hint)
    unsure = directory.look(model)
    if not unsure:
        return Check(OK, f'model "{model.name}": its files are those that were hashed, by size, inode and times')
    changed = f"{', '.join(unsure)} was written or copied after it was hashed, and is not hashed here"
    hint = f"`autoembed model verify {model.name}` hashes it, once; until then each process that loads the model does."
    return Check(WARN, f'model "{model.name}": {changed}', hint)


def check_encoder(current: Settings | None, model: Model | None) -> Check:
    if current is None or model is None:
        return Check(WARN, "without a default model there is no encoder to look at", "See the check named model.")
    packed = model.encoder == PACKED_ENCODER
    for package in PACKED_NEEDS if packed else PACKED_NEEDS + SENTENCE_TRANSFORMERS:
        if not is_installed(package):
            raise MissingPackage(package=package, purpose=f'model "{model.name}"')
    if packed and current.device in ("auto", "cpu"):
        return Check(OK, f'model "{model.name}" runs in the packed encoder')
    return Check(OK, f'model "{model.name}" runs in sentence-transformers')


def is_installed(package: str) -> bool:
    return package in sys.modules or importlib.util.find_spec(package) is not None


def check_settings(environ: Mapping[str, str]) -> Check:
    settings.read(environ)
    if names := settings.unknown(environ):
        hint = "Check the spelling, in the server's environment; embedding_settings shows what there is."
        return Check(WARN, f"{', '.join(names)}: not a setting", hint)
    return Check(OK, "every EMBEDDING_ variable of the server's environment is a setting that can be read")


def check_device(environ: Mapping[str, str]) -> Check:
    """Looks without loading torch, so that what every call will say is said by a fresh session, too."""
    return Check(OK, device.check(settings.read(environ).device))


def check_torch() -> Check:
    if not is_installed("torch"):
        raise MissingPackage(package="torch", purpose="every model")
    if "torch" not in sys.modules:
        return Check(OK, "torch is installed; its speed is not measured in a session that has not loaded it")
    gflops = one_core_gflops()
    message = f"torch computes float32 products at {gflops:.0f} GFLOP/s on one core"
    if gflops >= cpu.SLOW_GFLOPS:
        return Check(OK, message)
    return Check(WARN, f"{message}, as with a reference BLAS", cpu.BLAS_HINT)


def one_core_gflops() -> float:
    """Measures one: two threads on busy cores would wait for each other for longer than all of it takes."""
    import torch

    before = torch.get_num_threads()
    threads.use(1)
    try:
        return cpu.matmul_gflops(SMALL_PRODUCT)
    finally:
        threads.use(before)


def check_preload(gd: dict[str, Any], model: Model | None) -> Check:
    found: preloaded.Preloaded | None = gd.get(preloaded.KEY)
    state = preloaded.report(gd)
    if found is None:
        wanted = (
            state
            if settings.preload_names()
            else "no model is preloaded: each session loads its own, which takes seconds"
        )
        return Check(WARN, wanted, PRELOAD_HINT)
    if found.problems:
        return Check(WARN, state, "The server's log has the whole message. Mend the model, then restart the server.")
    if model is not None and model.name not in found.encoders:
        return Check(WARN, f'the default model "{model.name}" is not preloaded; {state}', PRELOAD_HINT)
    if model is not None and found.encoders[model.name].model != model:
        message = f'model "{model.name}" is another one than the postmaster loaded: each session loads it by itself'
        return Check(WARN, message, "Restart the server, and it is preloaded again.")
    return Check(OK, state)
