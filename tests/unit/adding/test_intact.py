"""Folders that were downloaded by halves: one clear error each, before anything is made of them."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from autoembed.adding.add import add_model, remove_model
from autoembed.errors import AutoembedError, BrokenModel, MissingFile, UnreadableModel, UnwritableDirectory
from autoembed.models import directory as model_directory

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 90868376\n"

Change = Callable[[Path], None]


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """With weights in safetensors, and pickled ones beside them that nobody reads."""
    return Path(shutil.copytree(folders["tiny-mpnet"], tmp_path / "tiny-mpnet"))


def write(file: str, content: str) -> Change:
    def change(folder: Path) -> None:
        (folder / file).write_text(content, encoding="utf-8")

    return change


def empty(file: str) -> Change:
    return write(file, "")


def cut(file: str, size: int) -> Change:
    return lambda folder: os.truncate(folder / file, size)


def directory(file: str) -> Change:
    def change(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).mkdir()

    return change


def dangling(file: str) -> Change:
    def change(folder: Path) -> None:
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to(folder / "blobs" / "gone")

    return change


def unreadable(file: str) -> Change:
    return lambda folder: (folder / file).chmod(0)


DAMAGES: list[tuple[Change, type[AutoembedError], str]] = [
    (write("model.safetensors", POINTER), BrokenModel, r"model\.safetensors is a pointer of Git-LFS"),
    (write("config.json", POINTER), BrokenModel, r"config\.json is a pointer of Git-LFS"),
    (write("tokenizer.json", POINTER), BrokenModel, r"tokenizer\.json is a pointer of Git-LFS"),
    (write("vocab.txt", POINTER), BrokenModel, r"vocab\.txt is a pointer of Git-LFS"),
    (cut("model.safetensors", 5), BrokenModel, r"model\.safetensors is cut off: it has 5 bytes"),
    (cut("model.safetensors", 500), BrokenModel, r"model\.safetensors is cut off: it has 500 bytes"),
    (cut("model.safetensors", 20_000), BrokenModel, r"model\.safetensors is cut off: it has 20000 bytes of \d+"),
    (write("model.safetensors", "<html>404</html>"), BrokenModel, r"model\.safetensors is no safetensors file"),
    (empty("model.safetensors"), BrokenModel, r"model\.safetensors is empty"),
    (empty("vocab.txt"), BrokenModel, r"vocab\.txt is empty"),
    (empty("config.json"), BrokenModel, r"config\.json is not JSON"),
    (write("config.json", "[]"), BrokenModel, r"config\.json is no JSON object"),
    (write("config.json", "[" * 100_000), BrokenModel, r"config\.json is not JSON"),
    (write("modules.json", "{"), BrokenModel, r"modules\.json is not JSON"),
    (write("modules.json", '{"0": "Transformer"}'), BrokenModel, r"modules\.json is damaged"),
    (write("1_Pooling/config.json", "{"), BrokenModel, "trying it out raised"),
    (write("sentence_bert_config.json", "7"), BrokenModel, r"sentence_bert_config\.json is no JSON object"),
    (write("config_sentence_transformers.json", '{"prompts": ["q"]}'), BrokenModel, "prompts that are no texts"),
    (write("tokenizer_config.json", "null"), BrokenModel, r"tokenizer_config\.json is no JSON object"),
    (directory("modules.json"), UnreadableModel, "Is a directory"),
    (directory("config.json"), UnreadableModel, "Is a directory"),
    (directory("model.safetensors"), MissingFile, r"model\.safetensors"),
    (directory("tokenizer.json"), MissingFile, r"tokenizer\.json"),
    (dangling("modules.json"), MissingFile, r"modules\.json"),
    (dangling("sentence_bert_config.json"), MissingFile, r"sentence_bert_config\.json"),
    (dangling("model.safetensors"), MissingFile, r"model\.safetensors"),
]
FORBIDDEN = ["model.safetensors", "config.json", "modules.json", "vocab.txt", "1_Pooling", "."]


@pytest.mark.parametrize(("damage", "error", "words"), DAMAGES)
def test_a_damaged_file_is_named(
    folder: Path, tmp_path: Path, damage: Change, error: type[AutoembedError], words: str
) -> None:
    damage(folder)
    with pytest.raises(error, match=words) as raised:
        add_model(folder, tmp_path / "shelf")
    assert raised.value.hint
    assert "\n" not in str(raised.value)
    assert [path.name for path in (tmp_path / "shelf").glob("*") if path.name != ".lock"] == []


@pytest.mark.parametrize("file", FORBIDDEN)
def test_a_file_that_the_caller_may_not_read_is_named(folder: Path, tmp_path: Path, file: str) -> None:
    unreadable(file)(folder)
    with pytest.raises(UnreadableModel, match="Permission denied") as raised:
        add_model(folder, tmp_path / "shelf")
    assert raised.value.hint
    (folder / file).chmod(0o755)


@pytest.mark.parametrize("content", [POINTER, "", "not a pickle"])
def test_pickled_weights_that_are_none(folders: dict[str, Path], tmp_path: Path, content: str) -> None:
    folder = Path(shutil.copytree(folders["tiny-codebert"], tmp_path / "codebert"))
    (folder / "pytorch_model.bin").write_text(content)
    with pytest.raises(BrokenModel, match=r"pytorch_model\.bin is (a pointer|empty|damaged)"):
        add_model(folder, tmp_path / "shelf")


def test_weights_that_fit_their_header_but_not_the_network(folder: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BrokenModel, match="its weights do not fit"):
        add_model(folder, tmp_path / "shelf")


@pytest.mark.parametrize("name", ["tiny-mpnet", "tiny-codebert"])
def test_no_room_for_a_model(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Copied, and converted: what Python says of a full disk, and what safetensors does."""
    limit = (20_000, 20_000)
    done = subprocess.run(
        [sys.executable, "-m", "autoembed", "model", "add", folders[name], "--dir", tmp_path / "shelf"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(model_directory.__file__).parents[2])},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"error: {tmp_path / 'shelf'} cannot be written: File too large",
        "hint: Make room there, or name another directory with --dir.",
    ]
    assert [path.name for path in (tmp_path / "shelf").iterdir()] == [".lock"]


def test_a_model_directory_that_may_not_be_written(folder: Path, tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    add_model(folder, shelf)
    shelf.chmod(0o555)
    try:
        for change in (lambda: add_model(folder, shelf, name="other"), lambda: remove_model("tiny-mpnet", shelf)):
            with pytest.raises(UnwritableDirectory, match="Permission denied") as raised:
                change()
            assert "sudo" in str(raised.value.hint)
    finally:
        shelf.chmod(0o755)


def test_documents_may_be_empty(folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").write_text("")
    assert add_model(folder, tmp_path / "shelf").new
