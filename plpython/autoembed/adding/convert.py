"""What published models lack, made once when a model is added: safetensors, tokenizer.json, modules.json."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from autoembed.errors import BrokenModel, InvalidOption, MissingFile, UnsupportedModel
from autoembed.models import layout as layouts
from autoembed.models.layout import Layout
from autoembed.process import cpu, environment
from autoembed.settings import PRECISIONS

if TYPE_CHECKING:
    from torch import Tensor

FLOAT32 = "float32"
POOLINGS = ("mean", "cls", "max")
DEFAULT_POOLING = "mean"  # what sentence-transformers takes for such a folder; it does not normalise either
KINDS = "sentence_transformers.models."


@dataclass(frozen=True)
class Options:
    """Options say how a folder becomes a model; None where the folder or a default decides."""

    pooling: str | None = None
    normalize: bool | None = None
    precision: str = FLOAT32


@dataclass
class Notes:
    converted: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)


def check_options(layout: Layout, options: Options) -> None:
    if options.precision not in PRECISIONS:
        raise InvalidOption(option="--precision", problem=f"must be {' or '.join(PRECISIONS)}, not {options.precision}")
    if lacking := cpu.lacks(options.precision):
        raise InvalidOption(option="--precision", problem=f"must be float32 here: {lacking}")
    if layout.bare:
        return
    for option, value in (("--pooling", options.pooling), ("--normalize", options.normalize)):
        if value is not None:
            raise InvalidOption(
                option=option, problem=f'is for a bare folder, but model "{layout.name}" has modules.json'
            )


def complete(layout: Layout, target: Path, options: Options) -> Notes:
    """Makes in `target`, which holds a copy of the files already, what the source lacks."""
    notes = Notes()
    for module in layout.modules:
        if module.has_weights:
            _convert_weights(layout, module.path, target, notes)
    _convert_tokenizer(layout, target / layout.modules[0].path, notes)
    if layout.bare:
        _write_modules(layout, target, options, notes)
    return notes


def _convert_weights(layout: Layout, path: str, target: Path, notes: Notes) -> None:
    directory = layout.folder / path
    pickles = [
        file for file in layouts.choose_weights(each.name for each in directory.iterdir()) if layouts.is_pickled(file)
    ]
    if pickles:
        weights = _unpickled([directory / file for file in pickles], layout.name)
        _save(weights, target / path / "model.safetensors")
        notes.converted.append(f"{PurePosixPath(path) / pickles[0]} to model.safetensors")


def _unpickled(files: Iterable[Path], name: str) -> dict[str, Tensor]:
    """Loads tensors alone: `weights_only` refuses every pickle that would run code."""
    import torch

    weights: dict[str, Any] = {}
    for file in files:
        try:
            weights |= torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError, ValueError) as error:
            reason = f"{file.name} is damaged or holds more than weights ({type(error).__name__})"
            raise BrokenModel(name=name, reason=reason, hint="Find a copy of the model with safetensors.") from None
    if not weights or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise UnsupportedModel(name=name, reason="its pickled file is no plain table of weights")
    return weights


def _save(weights: dict[str, Tensor], path: Path) -> None:
    """Saves the tensors. Tied weights share memory, which safetensors refuses: each name gets its own copy."""
    from safetensors.torch import save_file

    save_file({key: tensor.detach().clone().contiguous() for key, tensor in weights.items()}, path, {"format": "pt"})


def _convert_tokenizer(layout: Layout, folder: Path, notes: Notes) -> None:
    if (folder / "tokenizer.json").is_file():
        return
    vocabularies = [file.name for pattern in layouts.VOCABULARIES for file in sorted(folder.glob(pattern))]
    if not vocabularies:
        hint = "A tokenizer.json, vocab.txt, vocab.json with merges.txt, or a sentencepiece model is needed."
        raise MissingFile(name=layout.name, file="tokenizer", hint=hint)
    _fast_tokenizer(folder, layout.name).save(str(folder / "tokenizer.json"))
    notes.converted.append(f"{vocabularies[0]} to tokenizer.json")


def _fast_tokenizer(folder: Path, name: str) -> Any:
    environment.set_up_libraries()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a damaged vocabulary raises; this never runs in the server
        reason = f"its tokenizer cannot be read ({type(error).__name__}: {error})"
        raise BrokenModel(name=name, reason=reason, hint="Check the vocabulary's files.") from error
    if not tokenizer.is_fast:
        raise UnsupportedModel(name=name, reason=f"{type(tokenizer).__name__} has no form as tokenizer.json")
    return tokenizer.backend_tokenizer


def _write_modules(layout: Layout, target: Path, options: Options, notes: Notes) -> None:
    pooling, normalize = options.pooling or DEFAULT_POOLING, bool(options.normalize)
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), *([("Normalize", "2_Normalize")] if normalize else [])]
    listed = [
        {"idx": number, "name": str(number), "path": path, "type": KINDS + kind}
        for number, (kind, path) in enumerate(modules)
    ]
    _write_json(target / layouts.MODULES, listed)
    _write_json(target / "1_Pooling" / "config.json", _pooling(layout, pooling))
    notes.converted.append("a bare folder to sentence-transformers' format")
    if options.pooling is None:
        notes.assumed.append(f"{pooling} pooling (--pooling)")
    if options.normalize is None:
        notes.assumed.append("vectors are not normalised (--normalize)")
    _write_length(layout, target, notes)


def _pooling(layout: Layout, pooling: str) -> dict[str, Any]:
    size = layout.config.get("hidden_size") or layout.config.get("dim") or layout.config.get("d_model")
    if size is None:
        raise UnsupportedModel(name=layout.name, reason="its config.json names no hidden_size")
    return {
        "word_embedding_dimension": size,
        "pooling_mode_cls_token": pooling == "cls",
        "pooling_mode_mean_tokens": pooling == "mean",
        "pooling_mode_max_tokens": pooling == "max",
    }


def _write_length(layout: Layout, target: Path, notes: Notes) -> None:
    if layout.position_limit is None or list(target.glob("sentence_*_config.json")):
        return
    path = target / "tokenizer_config.json"
    claimed = layouts.read_json(path, layout.name).get("model_max_length") if path.is_file() else None
    length = min(layout.position_limit, int(claimed or layout.position_limit))
    _write_json(target / "sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": False})
    notes.assumed.append(f"at most {length} tokens")


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
