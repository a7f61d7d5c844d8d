from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autoembed import settings
from autoembed.adding.add import add_model
from autoembed.encoding.load import load_encoder
from autoembed.errors import (
    AutoembedError,
    BrokenModel,
    ChangedModel,
    InvalidName,
    OutOfMemory,
    UnknownModel,
    UnreadableModel,
    WrongDimensions,
)
from autoembed.models import directory, manifest
from autoembed.process import memory
from autoembed.settings import Settings

MPNET = "tiny-mpnet"
STAMP_OF_TEXTS = dict.fromkeys(("size", "inode", "mtime_ns", "ctime_ns"), "9")


def test_finding_tells_what_the_manifest_knows(shelf: Settings) -> None:
    model = directory.find(shelf, "all-MiniLM-L6-v2")
    assert (model.dimensions, model.max_tokens, model.architecture) == (384, 256, "bert")
    assert (model.normalizes, model.precision, model.default_prompt) == (True, "float32", None)
    assert model.prompts == {"query": "", "document": ""}
    assert model.path == shelf.model_dir / "all-MiniLM-L6-v2"
    assert model.bytes == (model.path / "model.safetensors").stat().st_size
    assert len(model.fingerprint) == 64


def test_finding_takes_milliseconds_and_imports_nothing_heavy(shelf: Settings) -> None:
    code = f"""
import sys, time
from autoembed import errors, settings
from autoembed.models import directory
current = settings.read({{"EMBEDDING_MODEL_DIR": {str(shelf.model_dir)!r}}})
directory.find(current, {MPNET!r}), directory.catalog(current)
start = time.process_time()
directory.find(current, {MPNET!r})
print((time.process_time() - start) * 1000)
heavy = {{"torch", "numpy", "transformers", "sentence_transformers", "tokenizers", "huggingface_hub"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(directory.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 50


@pytest.mark.parametrize("name", ["", "..", "../x", "/etc", "a b", ".hidden", "x" * 200, "a\nb"])
def test_a_name_is_never_a_path(shelf: Settings, name: str) -> None:
    with pytest.raises(InvalidName) as raised:
        directory.find(shelf, name)
    assert raised.value.sqlstate == "22023"


def test_a_hubs_name_gets_the_right_one_suggested(shelf: Settings) -> None:
    with pytest.raises(InvalidName) as raised:
        directory.find(shelf, "sentence-transformers/all-MiniLM-L6-v2")
    assert 'Did you mean "all-MiniLM-L6-v2"?' in str(raised.value.hint)


def test_an_unknown_model_comes_with_what_there_is(shelf: Settings, tmp_path: Path) -> None:
    with pytest.raises(UnknownModel) as raised:
        directory.find(shelf, "no-such-model")
    assert MPNET in str(raised.value.hint)
    assert "model add PATH" in str(raised.value.hint)
    with pytest.raises(UnknownModel) as raised:
        directory.find(replace(shelf, model_dir=tmp_path / "nowhere"))
    assert "none yet" in str(raised.value.hint)


def test_the_default_model(shelf: Settings, own_shelf: Settings) -> None:
    assert directory.find(replace(shelf, model_name=MPNET)).name == MPNET
    assert directory.find(own_shelf).name == MPNET, "the only one there is"
    with pytest.raises(UnknownModel, match="all-mpnet-base-v2"):
        directory.find(shelf)


def test_the_dimensions_are_checked(own_shelf: Settings) -> None:
    assert directory.find(replace(own_shelf, dimensions=32)).dimensions == 32
    with pytest.raises(WrongDimensions, match=r"is 768, but model .* has 32"):
        directory.find(replace(own_shelf, dimensions=768))


def test_the_length_decides_the_fingerprint_and_is_capped_by_positions(own_shelf: Settings) -> None:
    default = directory.find(own_shelf)
    shorter = directory.find(replace(own_shelf, max_seq_length=16))
    longer = directory.find(replace(own_shelf, max_seq_length=4096))
    assert (default.max_tokens, shorter.max_tokens, longer.max_tokens) == (48, 16, 64)
    assert len({default.fingerprint, shorter.fingerprint, longer.fingerprint}) == 3
    assert directory.find(replace(own_shelf, max_seq_length=48)).fingerprint == default.fingerprint


def test_a_fingerprint_does_not_depend_on_name_time_or_documents(folders: dict[str, Path], own_shelf: Settings) -> None:
    before = directory.find(own_shelf, MPNET).fingerprint
    add_model(folders[MPNET], own_shelf.model_dir, name="twin")
    assert directory.find(own_shelf, "twin").fingerprint == before


def test_a_folder_without_manifest_is_no_model(own_shelf: Settings) -> None:
    (own_shelf.model_dir / "raw").mkdir()
    with pytest.raises(BrokenModel, match="was not added"):
        directory.find(own_shelf, "raw")
    assert directory.catalog(own_shelf)[0].status == "unregistered"
    assert directory.find(own_shelf).name == MPNET


@pytest.mark.parametrize("content", ["not json", "[]", '{"format": 99}', '{"format": 1, "name": "x"}'])
def test_a_damaged_manifest_is_said(own_shelf: Settings, content: str) -> None:
    (own_shelf.model_dir / MPNET / manifest.FILE).write_text(content)
    with pytest.raises(BrokenModel, match=r"autoembed\.json"):
        directory.find(own_shelf, MPNET)
    assert directory.catalog(own_shelf)[0].status.startswith("broken: ")


def test_a_missing_file_is_said(own_shelf: Settings) -> None:
    (own_shelf.model_dir / MPNET / "model.safetensors").unlink()
    with pytest.raises(BrokenModel, match=r"model\.safetensors is missing"):
        directory.find(own_shelf, MPNET)
    assert "model.safetensors is missing" in directory.catalog(own_shelf)[0].status


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_closed_directory_is_said(own_shelf: Settings) -> None:
    own_shelf.model_dir.chmod(0)
    try:
        with pytest.raises(UnreadableModel) as raised:
            directory.find(own_shelf, MPNET)
        with pytest.raises(UnreadableModel):
            directory.catalog(own_shelf)
    finally:
        own_shelf.model_dir.chmod(0o755)
    assert raised.value.sqlstate == "58P01"


def corrupt(path: Path) -> None:
    """One bit, with size and modification time kept."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json", "1_Pooling/config.json"])
def test_a_changed_bit_is_refused(own_shelf: Settings, file: str) -> None:
    time.sleep(0.02)  # beyond the clock's tick
    corrupt(own_shelf.model_dir / MPNET / file)
    model = directory.find(own_shelf, MPNET)
    for check in (directory.verify, directory.check_files, lambda model: load_encoder(model, own_shelf)):
        with pytest.raises(ChangedModel, match=file) as raised:
            check(model)
        assert raised.value.sqlstate == "55000"


def test_another_size_shows_in_the_catalog(own_shelf: Settings) -> None:
    with (own_shelf.model_dir / MPNET / "config.json").open("a") as file:
        file.write(" ")
    assert directory.catalog(own_shelf)[0].status == "broken: config.json has another size"


def test_a_file_too_many_is_refused(own_shelf: Settings) -> None:
    (own_shelf.model_dir / MPNET / "adapter_config.json").write_text("{}")
    with pytest.raises(ChangedModel, match=r"adapter_config\.json was not there"):
        directory.check_files(directory.find(own_shelf, MPNET))
    assert directory.catalog(own_shelf)[0].status.startswith("broken: ")


def test_a_touched_file_is_hashed_once_by_each_process_until_verify_renews_its_stamp(
    own_shelf: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = directory.find(own_shelf, MPNET)
    (model.path / "config.json").touch()
    hashed: list[str] = []
    real = manifest.sha256

    def watched(path: Path) -> str:
        hashed.append(path.name)
        return real(path)

    monkeypatch.setattr(manifest, "sha256", watched)
    directory.check_files(model)
    directory.check_files(model)
    assert hashed == ["config.json"]
    directory.HASHED.clear()  # as another process
    directory.check_files(model)
    assert hashed == ["config.json", "config.json"]
    directory.verify(model)
    hashed.clear()
    directory.HASHED.clear()
    directory.check_files(model)
    assert hashed == []
    assert directory.find(own_shelf, MPNET) == model


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_verify_works_for_who_may_only_read(own_shelf: Settings) -> None:
    model = directory.find(own_shelf, MPNET)
    (model.path / "config.json").touch()
    model.path.chmod(0o555)
    try:
        directory.verify(model)
    finally:
        model.path.chmod(0o755)


def test_weights_beyond_the_memory_limit_are_not_loaded(shelf: Settings) -> None:
    current = replace(shelf, max_memory_mb=50)
    with pytest.raises(OutOfMemory, match="86 MB, and EMBEDDING_MAX_MEMORY_MB is 50"):
        load_encoder(directory.find(current, "all-MiniLM-L6-v2"), current)


def test_the_catalog_shows_every_folder(own_shelf: Settings) -> None:
    (own_shelf.model_dir / "raw").mkdir()
    (own_shelf.model_dir / "no name").mkdir()
    (own_shelf.model_dir / ".tiny-mpnet.half").mkdir()
    (own_shelf.model_dir / "a-file").write_text("")
    found = {entry.name: entry for entry in directory.catalog(own_shelf)}
    assert {name: entry.status for name, entry in found.items()} == {
        MPNET: "ready",
        "raw": "unregistered",
        "no name": "broken: not a model's name",
    }
    assert found[MPNET].fingerprint == directory.find(own_shelf, MPNET).fingerprint
    assert found[MPNET].note == "served by the packed encoder; vocab.txt to tokenizer.json"


def test_without_a_directory_the_catalog_is_empty(tmp_path: Path) -> None:
    assert directory.catalog(settings.read({"EMBEDDING_MODEL_DIR": str(tmp_path / "nowhere")})) == []


def test_every_error_of_finding_is_ours(own_shelf: Settings) -> None:
    for name in ("x", "x/y", "", "raw"):
        with pytest.raises(AutoembedError):
            directory.find(own_shelf, name)


@pytest.mark.parametrize("collecting", [True, False])
def test_nothing_is_collected_while_libraries_are_imported(collecting: bool) -> None:
    """And what the session's other code had chosen holds again, also after an error."""

    @memory.uncollected()
    def load() -> None:
        assert not gc.isenabled()
        raise KeyError

    (gc.enable if collecting else gc.disable)()
    try:
        with pytest.raises(KeyError):
            load()
        assert gc.isenabled() == collecting
    finally:
        gc.enable()


@pytest.fixture
def beside(own_shelf: Settings) -> Iterator[Path]:
    """A folder that nobody may look into, beside a model."""
    folder = own_shelf.model_dir / "under-way"
    folder.mkdir(mode=0)
    yield folder
    folder.chmod(0o755)


def test_one_unreadable_folder_is_broken_and_hides_no_other(own_shelf: Settings, beside: Path) -> None:
    broken, ready = sorted(directory.catalog(own_shelf), key=lambda entry: entry.status)
    assert (broken.name, broken.status) == (
        "under-way", f"broken: {beside / 'autoembed.json'} cannot be read: Permission denied"
    )  # fmt: skip
    assert (ready.name, ready.status) == ("tiny-mpnet", "ready")
    assert directory.registered(own_shelf.model_dir) == ["tiny-mpnet"]
    assert directory.find(own_shelf).name == "tiny-mpnet"
    with pytest.raises(UnreadableModel, match="Permission denied"):
        directory.find(own_shelf, "under-way")


@pytest.mark.parametrize("file", ["model.safetensors", "1_Pooling", "autoembed.json"])
def test_what_of_a_model_may_not_be_read_is_named(own_shelf: Settings, file: str) -> None:
    path = own_shelf.model_dir / "tiny-mpnet" / file
    path.chmod(0)
    try:
        (entry,) = directory.catalog(own_shelf)
        wanted = "ready" if file == "model.safetensors" else "broken"  # which a look at sizes does not open
        assert entry.status.startswith(wanted)
        with pytest.raises((UnreadableModel, ChangedModel)):
            directory.verify(directory.find(own_shelf, "tiny-mpnet"))
    finally:
        path.chmod(0o755)


def test_a_link_to_where_nobody_may_look(own_shelf: Settings, beside: Path) -> None:
    (own_shelf.model_dir / "linked").symlink_to(beside / "inner")
    assert {entry.name: entry.status[:6] for entry in directory.catalog(own_shelf)} == {
        "linked": "broken", "tiny-mpnet": "ready", "under-way": "broken",
    }  # fmt: skip


def test_a_folder_that_goes_during_the_look(own_shelf: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    other = own_shelf.model_dir / "going"
    shutil.copytree(own_shelf.model_dir / "tiny-mpnet", other)
    read = manifest.read

    def read_and_remove(folder: Path) -> manifest.Manifest:
        found = read(folder)
        if folder == other:
            shutil.rmtree(folder)
        return found

    monkeypatch.setattr(manifest, "read", read_and_remove)
    assert {entry.name: entry.status[:6] for entry in directory.catalog(own_shelf)} == {
        "going": "broken", "tiny-mpnet": "ready",
    }  # fmt: skip
    assert [entry.name for entry in directory.catalog(own_shelf)] == ["tiny-mpnet"]


def test_files_beside_models_are_none(own_shelf: Settings) -> None:
    (own_shelf.model_dir / "notes.txt").write_text("all-mpnet-base-v2 comes on Monday")
    (own_shelf.model_dir / "all-mpnet-base-v2").write_text("")
    assert [entry.name for entry in directory.catalog(own_shelf)] == ["tiny-mpnet"]
    with pytest.raises(UnreadableModel, match="Not a directory"):
        directory.find(own_shelf, "all-mpnet-base-v2")


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"dimensions": "32"},
        {"max_tokens": None},
        {"prompts": []},
        {
            "files": {
                "config.json": {"sha256": "x", "stamp": dict.fromkeys(("size", "inode", "mtime_ns", "ctime_ns"), "9")}
            }
        },
        {"assumed": "nothing"},
    ],
    ids=str,
)
def test_another_versions_manifest_breaks_its_own_model_alone(own_shelf: Settings, change: dict[str, Any]) -> None:
    other = own_shelf.model_dir / "other"
    shutil.copytree(own_shelf.model_dir / "tiny-mpnet", other)
    content = json.loads((other / manifest.FILE).read_text())
    (other / manifest.FILE).write_text(json.dumps(content | change))
    statuses = {entry.name: entry.status for entry in directory.catalog(own_shelf)}
    assert statuses["tiny-mpnet"] == "ready"
    assert statuses["other"].startswith('broken: model "other" cannot be used: autoembed.json is')
