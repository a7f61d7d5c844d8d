from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import models_for_tests as made
from autoembed.adding import add, trial
from autoembed.adding.add import add_model, remove_model
from autoembed.adding.convert import Options
from autoembed.errors import BrokenModel, InvalidName, InvalidOption, ModelExists, UnknownModel, UnwritableDirectory
from autoembed.models import directory as model_directory
from autoembed.models import manifest
from autoembed.settings import Settings

MPNET = "tiny-mpnet"


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders[MPNET], tmp_path / MPNET))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "models"


def content(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != add.LOCK)


def test_the_manifest_tells_where_a_model_came_from(folder: Path, directory: Path) -> None:
    added = add_model(folder, directory)
    assert added.new
    read = manifest.read(directory / MPNET)
    assert read == added.manifest
    assert (read.origin.source, read.origin.revision) == (str(folder), None)
    assert read.origin.options == {"pooling": None, "normalize": None, "precision": "float32"}
    assert read.tools["torch"].startswith("2.")
    assert set(read.files) == set(manifest.paths(directory / MPNET))
    assert all(manifest.sha256(directory / MPNET / file) == known.sha256 for file, known in read.files.items())


def test_the_same_again_is_a_quick_no_op(folder: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_model(folder, directory)
    before = (directory / MPNET).stat().st_ino
    monkeypatch.setattr(trial, "try_out", lambda *_: pytest.fail("tried out again"))
    again = add_model(folder, directory)
    assert not again.new
    assert (directory / MPNET).stat().st_ino == before


def test_a_damaged_model_needs_force_even_for_the_same_content(folder: Path, directory: Path) -> None:
    added = add_model(folder, directory)
    (added.folder / "model.safetensors").unlink()
    with pytest.raises(ModelExists):
        add_model(folder, directory)
    assert add_model(folder, directory, force=True).new
    assert model_directory.status(added.folder, manifest.read(added.folder)) == "ready"


def test_other_content_needs_force(folder: Path, directory: Path) -> None:
    first = add_model(folder, directory)
    made.change_weights(folder, lambda weights: weights["embeddings.LayerNorm.bias"].add_(1))
    with pytest.raises(ModelExists) as raised:
        add_model(folder, directory)
    assert raised.value.sqlstate == "42710"
    second = add_model(folder, directory, force=True)
    assert second.new
    assert second.manifest.fingerprint(48) != first.manifest.fingerprint(48)
    assert content(directory) == [MPNET]


def test_other_options_are_another_model(folders: dict[str, Path], directory: Path) -> None:
    add_model(folders["tiny-codebert"], directory)
    with pytest.raises(ModelExists):
        add_model(folders["tiny-codebert"], directory, options=Options(pooling="cls"))
    add_model(folders["tiny-codebert"], directory, name="codebert-cls", options=Options(pooling="cls"))
    assert content(directory) == ["codebert-cls", "tiny-codebert"]


@pytest.mark.parametrize("make", [made.wrong_dimension, made.always_nan])
def test_a_model_that_fails_the_first_encoding_leaves_nothing(make: object, tmp_path: Path, directory: Path) -> None:
    folder = make(tmp_path)  # type: ignore[operator]
    with pytest.raises(BrokenModel) as raised:
        add_model(folder, directory)
    assert raised.value.hint == "It was not added."
    assert content(directory) == []


def test_a_failing_replacement_leaves_the_old_model(folder: Path, directory: Path) -> None:
    before = add_model(folder, directory)
    made.change_weights(folder, lambda weights: weights["embeddings.LayerNorm.bias"].fill_(float("nan")))
    with pytest.raises(BrokenModel, match="not finite"):
        add_model(folder, directory, force=True)
    assert content(directory) == [MPNET]
    assert manifest.read(directory / MPNET) == before.manifest


def test_a_rename_that_fails_brings_the_old_model_back(
    folder: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = add_model(folder, directory)
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if target == directory / MPNET and (path / "model.safetensors").exists() and path.parent == directory:
            raise OSError("disk on fire")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    made.change_weights(folder, lambda weights: weights["embeddings.LayerNorm.bias"].add_(1))
    with pytest.raises(UnwritableDirectory, match="disk on fire"):
        add_model(folder, directory, force=True)
    assert content(directory) == [MPNET]
    assert manifest.read(directory / MPNET) == before.manifest


def test_missing_weights_are_not_filled_with_random_numbers(folder: Path, directory: Path) -> None:
    made.change_weights(folder, lambda weights: weights.pop("encoder.layer.1.attention.attn.q.weight"))
    with pytest.raises(BrokenModel, match=r"1 are missing.*attn\.q\.weight"):
        add_model(folder, directory)


def test_an_interrupted_add_leaves_nothing(folder: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trial, "try_out", interrupt)
    with pytest.raises(KeyboardInterrupt):
        add_model(folder, directory)
    assert content(directory) == []


def test_what_a_killed_add_left_is_cleared(folder: Path, directory: Path) -> None:
    (directory / f".{MPNET}.abcdef").mkdir(parents=True)
    add_model(folder, directory)
    assert content(directory) == [MPNET]


def test_everybody_may_read_whatever_the_umask(folder: Path, directory: Path) -> None:
    before = os.umask(0o077)
    try:
        add_model(folder, directory)
    finally:
        os.umask(before)
    for path in (directory / MPNET).rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path
    assert (directory / MPNET).stat().st_mode & 0o777 == 0o755


def test_code_and_other_frameworks_stay_behind(folder: Path, directory: Path) -> None:
    for file in ("modeling.py", "model.onnx", "pytorch_model.bin"):
        (folder / file).write_text("x")
    added = add_model(folder, directory)
    assert not {"modeling.py", "model.onnx", "pytorch_model.bin"} & set(added.manifest.files)


def test_links_are_followed(folder: Path, directory: Path, tmp_path: Path) -> None:
    """As the hub's own cache lays files out."""
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    added = add_model(folder, directory)
    assert not (added.folder / "model.safetensors").is_symlink()


def test_names(folder: Path, directory: Path) -> None:
    assert add_model(folder, directory, name="other").folder == directory / "other"
    with pytest.raises(InvalidName):
        add_model(folder, directory, name="../other")


def test_the_model_directorys_own_copy_is_no_source(folder: Path, directory: Path) -> None:
    added = add_model(folder, directory)
    with pytest.raises(InvalidOption, match="own copy"):
        add_model(added.folder, directory, force=True)
    assert model_directory.status(added.folder, manifest.read(added.folder)) == "ready"


def test_removing(own_shelf: Settings) -> None:
    remove_model(MPNET, own_shelf.model_dir)
    assert content(own_shelf.model_dir) == []
    with pytest.raises(UnknownModel):
        remove_model(MPNET, own_shelf.model_dir)
    with pytest.raises(InvalidName):
        remove_model("../models", own_shelf.model_dir)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written(folder: Path) -> None:
    with pytest.raises(UnwritableDirectory) as raised:
        add_model(folder, Path("/proc/models"))
    assert "sudo" in str(raised.value.hint)
