from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub import HfApi

from autoembed import __version__
from autoembed.adding import hub
from autoembed.command import cli
from autoembed.models import directory, manifest
from autoembed.settings import Settings
from unit.hub_for_tests import COMMIT, serving

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """run(argument, ...) -> exit status, stdout, stderr; the model directory is the test's own."""
    monkeypatch.setenv("EMBEDDING_MODEL_DIR", str(tmp_path / "models"))

    def call(*arguments: object) -> tuple[int, str, str]:
        status = cli.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return call


def in_a_process(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    variables |= {"PYTHONPATH": str(Path(cli.__file__).parents[2]), **environment}
    command = [sys.executable, "-m", "autoembed", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=variables, check=False)


def test_a_models_life(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    assert run("model", "list") == (0, f"no model in {tmp_path / 'models'}\n", "")
    status, out, err = run("model", "add", folders["tiny-codebert"], "--name", "codebert", "--pooling", "cls")
    assert (status, err) == (0, "")
    assert out.startswith("codebert: added in ")
    assert "roberta, 32 dimensions, 64 tokens, not normalised" in out
    assert "converted: pytorch_model.bin to model.safetensors" in out
    assert "assumed: vectors are not normalised (--normalize)" in out
    status, out, _ = run("model", "add", folders["tiny-codebert"], "--name", "codebert", "--pooling", "cls")
    assert (status, out.splitlines()[0]) == (0, f"codebert: already there, unchanged in {tmp_path / 'models'}")
    status, out, _ = run("model", "list")
    assert out.startswith("codebert: ready, roberta, 32 dimensions, 64 tokens, 0 MB, fingerprint ")
    assert run("model", "verify") == (0, "codebert: every file is as it was added\n", "")
    assert run("model", "remove", "codebert") == (0, "codebert: removed\n", "")
    assert run("model", "verify") == (0, "", "")


def test_normalize_and_no_normalize(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    for name, flag in (("yes", "--normalize"), ("no", "--no-normalize")):
        assert run("model", "add", folders["tiny-codebert"], "--name", name, flag, "--dir", tmp_path / "d")[0] == 0
        assert manifest.read(tmp_path / "d" / name).normalizes is (name == "yes")
    again = run("model", "add", folders["tiny-codebert"], "--name", "no", "--no-normalize", "--dir", tmp_path / "d")[1]
    assert "2 models are there: name one in embed_column and embed, or in EMBEDDING_MODEL_NAME" in again


def test_errors_come_with_hints_and_status_1(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    status, out, err = run("model", "add", tmp_path / "nowhere")
    assert (status, out) == (1, "")
    assert err.startswith('error: model "nowhere" has no folder ')
    assert run("model", "add", folders["tiny-mpnet"], "--pooling", "cls")[0] == 1
    status, _, err = run("model", "remove", "nobody")
    assert status == 1
    assert "hint: `autoembed model list`" in err


def test_verify_finds_the_one_that_changed(own_shelf: Settings, run: Run) -> None:
    with (own_shelf.model_dir / "tiny-mpnet" / "vocab.txt").open("a") as file:
        file.write("more\n")
    status, _, err = run("model", "verify", "--dir", own_shelf.model_dir)
    assert status == 1
    assert "vocab.txt has another SHA-256" in err
    (own_shelf.model_dir / "raw").mkdir()
    _, out, _ = run("model", "list", "--dir", own_shelf.model_dir)
    assert "raw: unregistered" in out


def test_the_servers_dimension_does_not_hinder_keeping_models(
    own_shelf: Settings, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBEDDING_DIMENSIONS", "768")
    assert run("model", "verify", "tiny-mpnet", "--dir", own_shelf.model_dir)[0] == 0


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["model"], ["model", "add"], ["model", "add", "x", "--precision", "int4"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 2
    capsys.readouterr()


def test_an_interrupt_is_no_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(directory, "catalog", interrupt)
    status, _, err = run("model", "list")
    assert status == 130
    assert "nothing was left behind" in err


def test_as_a_module() -> None:
    done = in_a_process("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{__version__}\n", "")


@pytest.fixture
def published(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A repository as they are: with weights for others and code beside what is needed."""
    folder = Path(shutil.copytree(folders["minilm-768"], tmp_path / "published"))
    for file in ("pytorch_model.bin", "tf_model.h5", "modeling.py", "onnx/model.onnx", "onnx/config.json"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text("x")
    return folder


def test_pull_takes_what_is_needed_and_records_the_commit(
    published: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with serving("sentence-transformers/minilm-768", published) as server:
        monkeypatch.setattr(hub, "client", lambda: HfApi(endpoint=server.address))
        status, out, err = run("model", "pull", "minilm-768", "--revision", "main")
    assert status == 0, err
    assert "minilm-768: added" in out
    read = manifest.read(tmp_path / "models" / "minilm-768")
    assert (read.origin.source, read.origin.revision) == ("sentence-transformers/minilm-768", COMMIT)
    assert {"model.safetensors", "2_Dense/model.safetensors", "tokenizer.json"} <= set(server.asked)
    assert not {"pytorch_model.bin", "tf_model.h5", "modeling.py", "onnx/model.onnx", "onnx/config.json"} & set(
        server.asked
    )


def test_pull_in_a_fresh_process(folders: dict[str, Path], tmp_path: Path) -> None:
    with serving("owner/tiny", folders["tiny-codebert"]) as server:
        environment = {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "home")}
        done = in_a_process(
            "model", "pull", "owner/tiny", "--dir", tmp_path / "models", "--name", "codebert", **environment
        )
    assert done.returncode == 0, done.stderr
    assert "converted: pytorch_model.bin to model.safetensors" in done.stdout
    assert manifest.read(tmp_path / "models" / "codebert").origin.revision == COMMIT


def test_pull_of_what_is_not_there_says_so(tmp_path: Path, folders: dict[str, Path]) -> None:
    with serving("somebody/else", folders["tiny-mpnet"]) as server:
        environment = {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path)}
        done = in_a_process("model", "pull", "owner/nothing", "--dir", tmp_path / "models", **environment)
    assert done.returncode == 1
    assert 'error: model "owner/nothing" could not be downloaded' in done.stderr
    assert "model add PATH" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unreachable_hub_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable() -> HfApi:
        raise ConnectionError("no route\nand much more")

    monkeypatch.setattr(hub, "client", unreachable)
    status, _, err = run("model", "pull", "nothing")
    assert status == 1
    assert err.startswith('error: model "nothing" could not be downloaded: ConnectionError: no route\nhint: ')


def test_names_on_the_hub() -> None:
    assert hub.repository("all-mpnet-base-v2") == "sentence-transformers/all-mpnet-base-v2"
    assert hub.repository("microsoft/codebert-base") == "microsoft/codebert-base"
