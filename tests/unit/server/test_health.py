from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from autoembed.models import manifest
from autoembed.process import cpu, device
from autoembed.server import health, preloaded
from autoembed.server.health import FAIL, OK, WARN, Check
from autoembed.settings import Settings
from support.stubs import add_stub

NAMES = ["model", "encoder", "settings", "device", "torch", "preload"]


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """A model directory with one model, whose weights are too large to be hashed at a look."""
    folder = add_stub(tmp_path, "stub-large", weights="w" * (3 << 20))
    return {"EMBEDDING_MODEL_DIR": str(folder.parent), "EMBEDDING_DEVICE": "cpu"}


def statuses(environ: dict[str, str]) -> dict[str, str]:
    return {name: check.status for name, check in health.check_all({}, environ).items()}


def look(environ: dict[str, str], name: str = "model") -> Check:
    return health.check_all({}, environ)[name]


def weights(environ: dict[str, str]) -> Path:
    return Path(environ["EMBEDDING_MODEL_DIR"]) / "stub-large" / "model.safetensors"


def test_all_is_well_but_for_preloading(environ: dict[str, str]) -> None:
    assert statuses(environ) == dict.fromkeys(NAMES, OK) | {"preload": WARN}
    assert "by size, inode and times" in look(environ).message


# --- the model -----------------------------------------------------------------------------------------------------


def test_models_of_which_none_is_the_default(environ: dict[str, str]) -> None:
    """Columns that are declared are filled all the same."""
    directory = Path(environ["EMBEDDING_MODEL_DIR"])
    add_stub(directory, "stub-other")
    assert look(environ).status == WARN
    assert 'no model was named, and the default model "all-mpnet-base-v2" is not' in look(environ).message
    assert look(environ | {"EMBEDDING_MODEL_NAME": "gone"}).status == FAIL
    for folder in directory.iterdir():
        (folder / "config.json").unlink(missing_ok=True)
        (folder / "model.safetensors").unlink(missing_ok=True)
    assert look(environ).status == FAIL


def test_weights_of_another_size(environ: dict[str, str]) -> None:
    with weights(environ).open("a") as file:
        file.write("more")
    assert look(environ).status == FAIL
    assert "model.safetensors has another size" in look(environ).message


def test_weights_written_over_are_not_called_unchanged(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same size, perhaps the very same: it would take a hash of them all to know."""
    with weights(environ).open("r+") as file:
        file.write("v")
    monkeypatch.setattr(manifest, "sha256", lambda path: pytest.fail(f"{path} was hashed"))
    found = look(environ)
    assert found.status == WARN
    assert "model.safetensors was written or copied after it was hashed, and is not hashed here" in found.message
    assert "autoembed model verify stub-large" in str(found.hint)


def test_small_files_are_hashed(tmp_path: Path) -> None:
    folder = add_stub(tmp_path, "stub-small", weights="weights")
    environ = {"EMBEDDING_MODEL_DIR": str(tmp_path)}
    os.utime(folder / "model.safetensors", (1, 1))
    assert look(environ).status == OK
    (folder / "model.safetensors").write_text("WEIGHTS")
    assert look(environ).status == FAIL
    assert "has another SHA-256" in look(environ).message


@pytest.mark.parametrize("damage", ["missing", "stranger", "manifest", "folder", "setting"])
def test_model_that_cannot_be_used(environ: dict[str, str], damage: str) -> None:
    folder = weights(environ).parent
    if damage == "missing":
        weights(environ).unlink()
    elif damage == "stranger":
        (folder / "adapter.safetensors").write_text("another")
    elif damage == "manifest":
        (folder / "autoembed.json").write_text("{")
    elif damage == "folder":
        shutil.rmtree(folder)
    else:
        environ["EMBEDDING_THREADS"] = "all"
    found = health.check_all({}, environ)
    assert list(found) == NAMES
    assert found["model"].status == FAIL
    assert found["model"].hint
    assert found["torch"].status == OK


# --- what runs it --------------------------------------------------------------------------------------------------


def test_which_encoder(shelf: Settings) -> None:
    environ = {"EMBEDDING_MODEL_DIR": str(shelf.model_dir), "EMBEDDING_MODEL_NAME": "tiny-mpnet"}
    assert "runs in the packed encoder" in look(environ, "encoder").message
    cuda = look(environ | {"EMBEDDING_DEVICE": "mps"}, "device")
    assert cuda.status == (OK if device.available("mps") else FAIL)


def test_package_that_is_missing(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "PACKED_NEEDS", ("torch", "no_such_package"))
    found = look(environ, "encoder")
    assert found.status == FAIL
    assert "the Python package no_such_package is not installed" in found.message
    assert "make install" in str(found.hint)


def test_torch_that_is_slow(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert look(environ, "torch").status == OK
    assert "GFLOP/s" in look(environ, "torch").message
    monkeypatch.setattr("torch.mm", lambda *_: time.sleep(0.01))
    found = look(environ, "torch")
    assert found.status == WARN
    assert found.hint == cpu.BLAS_HINT


def test_torch_that_is_not_loaded(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    assert "not measured" in look(environ, "torch").message
    assert "torch" not in sys.modules


# --- preloading ----------------------------------------------------------------------------------------------------


def test_preload_that_failed(environ: dict[str, str]) -> None:
    gd = {preloaded.KEY: preloaded.Preloaded(1, problems={"stub-large": "it is broken"})}
    found = health.check_all(gd, environ)["preload"]
    assert found == Check(WARN, "stub-large not loaded: it is broken", found.hint)


def test_default_model_that_is_not_preloaded(environ: dict[str, str]) -> None:
    gd = {preloaded.KEY: preloaded.Preloaded(1)}
    found = health.check_all(gd, environ)["preload"]
    assert found.status == WARN
    assert 'the default model "stub-large" is not preloaded' in found.message


# --- and whatever else ---------------------------------------------------------------------------------------------


def test_a_check_that_cannot_be_made_takes_no_other_with_it(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "matmul_gflops", None)
    found = health.check_all({}, environ)
    assert list(found) == NAMES
    assert found["torch"] == Check(WARN, "this check could not be made: TypeError")
    assert found["model"].status == OK


# --- settings and device -------------------------------------------------------------------------------------------


def test_a_device_that_is_not_there_fails_before_torch_is_loaded(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    for wanted in ("cuda", "cuda:1", "mps"):
        found = look(environ | {"EMBEDDING_DEVICE": wanted}, "device")
        assert found.status == FAIL
        assert found.message.startswith(f"EMBEDDING_DEVICE is {wanted}, but")
        assert found.hint
    for wanted in ("auto", "cpu"):
        assert look(environ | {"EMBEDDING_DEVICE": wanted}, "device").status == OK
    assert "torch" not in sys.modules


def test_a_gpu_that_may_be_there_is_for_torch_to_say(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "2.13.0+cu130")
    for file, status in (("/dev/null", OK), ("/dev/no-such-gpu", FAIL)):
        monkeypatch.setattr(device, "GPU_FILES", (file,))
        assert look(environ | {"EMBEDDING_DEVICE": "cuda:0"}, "device").status == status


def test_a_device_that_torch_does_not_find(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert look(environ | {"EMBEDDING_DEVICE": "cuda:1"}, "device").status == OK
    assert look(environ | {"EMBEDDING_DEVICE": "cuda:2"}, "device").status == FAIL


def test_what_is_no_setting_is_a_warning(environ: dict[str, str]) -> None:
    found = look(environ | {"embedding_thread": "2"}, "settings")
    assert (found.status, found.message) == (WARN, "embedding_thread: not a setting")
    assert look(environ | {"EMBEDDING_THREADS": "no"}, "settings").status == FAIL
