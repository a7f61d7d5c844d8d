from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from autoembed.errors import AutoembedError, BrokenModel, MissingFile, RemoteCode, UnsupportedModel
from autoembed.models import layout
from models_for_tests import write_json, write_modules


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A model of the test's own."""
    return Path(shutil.copytree(folders["tiny-mpnet"], tmp_path / "model"))


def inspect(folder: Path) -> layout.Layout:
    return layout.inspect(folder, "model")


def set_modules(*kinds: str, path: str = "") -> Callable[[Path], None]:
    listed = [{"idx": number, "name": str(number), "path": path, "type": kind} for number, kind in enumerate(kinds)]
    return lambda folder: write_json(folder / "modules.json", listed)


def add_json(file: str, **content: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / file
        before = layout.read_json(path, "model") if path.is_file() else {}
        write_json(path, before | content)

    return change


TRANSFORMER = "sentence_transformers.models.Transformer"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (set_modules("custom_model.Transformer"), RemoteCode, "custom_model"),
        (set_modules("sentence_transformers.util.Transformer"), UnsupportedModel, "util"),
        (set_modules("sentence_transformers.models.CLIPModel"), UnsupportedModel, "CLIPModel"),
        (set_modules("sentence_transformers.models.Pooling"), UnsupportedModel, "first module"),
        (set_modules(), UnsupportedModel, "first module"),
        (set_modules(TRANSFORMER, path="../elsewhere"), UnsupportedModel, "outside"),
        (set_modules(TRANSFORMER, path="/etc"), UnsupportedModel, "outside"),
        (lambda folder: write_json(folder / "modules.json", [{"idx": 0}]), BrokenModel, "modules.json is damaged"),
        (lambda folder: (folder / "config.json").write_text("{"), BrokenModel, "config.json is not JSON"),
        (lambda folder: (folder / "config.json").unlink(), MissingFile, "config.json"),
        (add_json("config.json", auto_map={"AutoModel": "modeling.Model"}), RemoteCode, "auto_map"),
        (add_json("tokenizer_config.json", auto_map={"AutoTokenizer": ["x.T", None]}), RemoteCode, "tokenizer_config"),
        (lambda folder: write_json(folder / "config.json", {}), UnsupportedModel, "model_type"),
        (add_json("adapter_config.json", base_model_name_or_path="x"), UnsupportedModel, "adapter"),
        (add_json("config_sentence_transformers.json", model_type="SparseEncoder"), UnsupportedModel, "SparseEncoder"),
    ],
)
def test_refused(folder: Path, change: Callable[[Path], None], error: type[AutoembedError], words: str) -> None:
    change(folder)
    with pytest.raises(error, match=words):
        inspect(folder)


def test_remote_code_is_named_as_such() -> None:
    assert issubclass(RemoteCode, UnsupportedModel)
    assert RemoteCode.sqlstate == "0A000"


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="nowhere"):
        inspect(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "kind",
    [
        "sentence_transformers.models.Pooling",
        "sentence_transformers.models.Pooling.Pooling",
        "sentence_transformers.base.modules.dense.Dense",
        "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
        "sentence_transformers.sentence_transformer.modules.Normalize",
    ],
)
def test_old_and_new_names_of_modules_are_known(folder: Path, kind: str) -> None:
    set_modules("sentence_transformers.base.modules.transformer.Transformer", kind)(folder)
    assert [module.kind for module in inspect(folder).modules] == ["Transformer", kind.rsplit(".", 1)[-1]]


def test_what_sentence_transformers_saves_today_is_known(folders: dict[str, Path], tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    SentenceTransformer(str(folders["minilm-768"]), device="cpu").save_pretrained(str(tmp_path / "saved"))
    found = inspect(tmp_path / "saved")
    assert [module.kind for module in found.modules] == ["Transformer", "Pooling", "Dense", "Normalize"]
    assert "2_Dense/model.safetensors" in layout.needed_files(found)


def test_only_needed_files_are_taken(folder: Path) -> None:
    for file in (
        "modeling.py",
        "pytorch_model.bin",
        "tf_model.h5",
        "rust_model.ot",
        "data_config.json",
        ".gitattributes",
        "README.md",
    ):
        (folder / file).write_text("x")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_text("x")
    assert layout.needed_files(inspect(folder)) == [
        "1_Pooling/config.json",
        "README.md",
        "config.json",
        "config_sentence_transformers.json",
        "model.safetensors",
        "modules.json",
        "sentence_bert_config.json",
        "vocab.txt",
    ]


def test_a_transformer_in_a_folder_of_its_own(folder: Path) -> None:
    """As older versions of sentence-transformers saved it."""
    (folder / "0_Transformer").mkdir()
    for file in ("config.json", "model.safetensors", "vocab.txt", "sentence_bert_config.json"):
        (folder / file).rename(folder / "0_Transformer" / file)
    write_modules(folder, [("Transformer", "0_Transformer"), ("Pooling", "1_Pooling")])
    found = inspect(folder)
    assert found.transformer == folder / "0_Transformer"
    assert "0_Transformer/model.safetensors" in layout.needed_files(found)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.onnx")
    with pytest.raises(MissingFile, match=r"model\.safetensors or pytorch_model\.bin"):
        layout.needed_files(inspect(folder))


def test_sharded_weights_need_their_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    with pytest.raises(MissingFile, match="index"):
        layout.needed_files(inspect(folder))
    (folder / layout.INDEX).write_text("{}")
    assert {layout.INDEX, "model-00001-of-00001.safetensors"} <= set(layout.needed_files(inspect(folder)))


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        (["pytorch_model.bin", "model.safetensors"], ["model.safetensors"]),
        (["pytorch_model.bin", "model.fp16.safetensors"], ["pytorch_model.bin"]),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],) * 2,
        (["training_args.bin", "openvino_model.bin", "flax_model.msgpack"], []),
    ],
)
def test_which_weights_are_chosen(there: list[str], chosen: list[str]) -> None:
    assert layout.choose_weights(there) == chosen


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"model_type": "bert", "max_position_embeddings": 512}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "mpnet", "max_position_embeddings": 514}, 512),
        ({"model_type": "xlm-roberta", "max_position_embeddings": 8194, "pad_token_id": 1}, 8192),
        ({"model_type": "t5"}, None),
        ({"model_type": "xlnet", "max_position_embeddings": -1}, None),
    ],
)
def test_how_many_tokens_have_positions(config: dict[str, object], limit: int | None) -> None:
    assert layout.Layout("m", Path(), (layout.Module("Transformer", ""),), config, bare=False).position_limit == limit


def test_a_default_prompt_must_exist(folder: Path) -> None:
    write_json(folder / "config_sentence_transformers.json", {"default_prompt_name": "none"})
    with pytest.raises(BrokenModel, match="default prompt"):
        layout.prompts(folder, "model")


def test_without_prompts_both_are_empty(tmp_path: Path) -> None:
    assert layout.prompts(tmp_path, "model") == ({"query": "", "document": ""}, None)
