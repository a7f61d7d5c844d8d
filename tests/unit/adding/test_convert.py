from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import models_for_tests as made
from autoembed import settings
from autoembed.adding import convert
from autoembed.adding.add import add_model
from autoembed.adding.convert import Options
from autoembed.encoding.load import load_encoder
from autoembed.errors import BrokenModel, InvalidOption, MissingFile, UnsupportedModel
from autoembed.models import directory
from autoembed.models import layout as layouts
from autoembed.models.layout import read_json
from autoembed.settings import Settings


@pytest.fixture
def roberta(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["tiny-codebert"], tmp_path / "codebert"))


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_pickled_weights_become_safetensors(shelf: Settings, folders: dict[str, Path]) -> None:
    import torch

    pickled = torch.load(folders["tiny-codebert"] / "pytorch_model.bin", weights_only=True)
    model = directory.find(shelf, "tiny-codebert")
    saved = tensors(model.path)
    assert saved.keys() == pickled.keys()
    assert all(torch.equal(saved[key], pickled[key]) for key in saved)
    assert not list(model.path.rglob("*.bin"))


def test_sharded_pickles_become_one_file(roberta: Path, tmp_path: Path) -> None:
    import torch

    weights = torch.load(roberta / "pytorch_model.bin", weights_only=True)
    keys = sorted(weights)
    for number, part in ((1, keys[::2]), (2, keys[1::2])):
        torch.save({key: weights[key] for key in part}, roberta / f"pytorch_model-0000{number}-of-00002.bin")
    (roberta / "pytorch_model.bin").unlink()
    added = add_model(roberta, tmp_path / "shelf")
    assert tensors(added.folder).keys() == weights.keys()


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(roberta: Path, tmp_path: Path) -> None:
    import torch

    torch.save({"weight": Bomb(tmp_path / "pwned")}, roberta / "pytorch_model.bin")
    with pytest.raises(BrokenModel, match="holds more than weights"):
        add_model(roberta, tmp_path / "shelf")
    assert not (tmp_path / "pwned").exists()


def test_a_damaged_pickle_is_refused(roberta: Path, tmp_path: Path) -> None:
    (roberta / "pytorch_model.bin").write_bytes(b"not a pickle")
    with pytest.raises(BrokenModel, match=r"pytorch_model\.bin is damaged"):
        add_model(roberta, tmp_path / "shelf")


def test_a_pickle_without_a_plain_table_is_refused(roberta: Path, tmp_path: Path) -> None:
    import torch

    torch.save({"epoch": 3, "state_dict": {}}, roberta / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match="no plain table"):
        add_model(roberta, tmp_path / "shelf")


@pytest.mark.parametrize("name", ["tiny-codebert", "tiny-bge-m3", "tiny-mpnet"])
def test_the_tokenizer_is_the_published_one(shelf: Settings, folders: dict[str, Path], name: str) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    published = AutoTokenizer.from_pretrained(folders[name], local_files_only=True)
    made_once = Tokenizer.from_file(str(shelf.model_dir / name / "tokenizer.json"))
    for text in (made.TEXT, "Grüße, 漢字", "", "  two  spaces "):
        assert made_once.encode(text).ids == published(text)["input_ids"]


def test_sentencepieces_own_ids_are_kept(shelf: Settings) -> None:
    """The pieces' own ids plus one, between <s> and </s>: as XLM-R was trained."""
    import sentencepiece
    from tokenizers import Tokenizer

    folder = shelf.model_dir / "tiny-bge-m3"
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sentencepiece.bpe.model"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for line in made.TEXT.splitlines():
        assert tokenizer.encode(line).ids == [0, *(number + 1 for number in pieces.encode(line)), 2]


def test_no_tokenizer(roberta: Path, tmp_path: Path) -> None:
    (roberta / "vocab.json").unlink()
    with pytest.raises(MissingFile, match="tokenizer"):
        add_model(roberta, tmp_path / "shelf")


def test_a_damaged_vocabulary(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["tiny-bge-m3"], tmp_path / "damaged"))
    (folder / "sentencepiece.bpe.model").write_bytes(b"\xff" * 100)
    with pytest.raises(BrokenModel, match="tokenizer cannot be read"):
        add_model(folder, tmp_path / "shelf")


def test_a_bare_folder_gets_modules_and_says_what_was_assumed(shelf: Settings) -> None:
    model = directory.find(shelf, "tiny-codebert")
    kinds = [module.kind for module in layouts.inspect(model.path, model.name).modules]
    assert kinds == ["Transformer", "Pooling"]
    assert (model.normalizes, model.max_tokens) == (False, 64)
    entry = next(entry for entry in directory.catalog(shelf) if entry.name == model.name)
    assert entry.note is not None
    for words in (
        "mean pooling (--pooling)",
        "not normalised (--normalize)",
        "at most 64 tokens",
        "to model.safetensors",
    ):
        assert words in entry.note


@pytest.mark.parametrize("pooling", convert.POOLINGS)
@pytest.mark.parametrize("normalize", [True, False])
def test_pooling_and_normalisation_are_chosen(roberta: Path, tmp_path: Path, pooling: str, normalize: bool) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    text = "vacuum removes dead rows"
    added = add_model(roberta, tmp_path / "shelf", options=Options(pooling, normalize))
    assert added.manifest.assumed == ["at most 64 tokens"]
    tokens = AutoTokenizer.from_pretrained(added.folder, local_files_only=True)(text, return_tensors="pt")
    with torch.inference_mode():
        states = AutoModel.from_pretrained(added.folder, local_files_only=True)(**tokens).last_hidden_state[0]
    expected = {"mean": states.mean(0), "cls": states[0], "max": states.max(0).values}[pooling].numpy()
    if normalize:
        expected = expected / np.linalg.norm(expected)
    current = settings.read({"EMBEDDING_MODEL_DIR": str(tmp_path / "shelf"), "EMBEDDING_DEVICE": "cpu"})
    encoder = load_encoder(directory.find(current), current)
    np.testing.assert_allclose(encoder.encode(encoder.tokenize([text]), lambda: None)[0], expected, atol=2e-6)


def test_the_tokenizers_own_limit_is_kept(roberta: Path, tmp_path: Path) -> None:
    made.write_json(roberta / "tokenizer_config.json", {"model_max_length": 20})
    added = add_model(roberta, tmp_path / "shelf")
    assert (added.manifest.max_tokens, added.manifest.position_limit) == (20, 64)


@pytest.mark.parametrize("options", [Options(pooling="cls"), Options(normalize=False)])
def test_a_folder_with_modules_decides_itself(folders: dict[str, Path], tmp_path: Path, options: Options) -> None:
    with pytest.raises(InvalidOption, match="is for a bare folder") as raised:
        add_model(folders["tiny-mpnet"], tmp_path, options=options)
    assert raised.value.sqlstate == "22023"


def test_an_unknown_precision(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidOption, match="must be float32 or bfloat16 or int8, not int4"):
        add_model(folders["tiny-mpnet"], tmp_path, options=Options(precision="int4"))


def test_a_bare_folder_without_a_width(roberta: Path, tmp_path: Path) -> None:
    config = read_json(roberta / "config.json", "codebert")
    del config["hidden_size"]
    made.write_json(roberta / "config.json", config)
    with pytest.raises(UnsupportedModel, match="hidden_size"):
        add_model(roberta, tmp_path / "shelf")
