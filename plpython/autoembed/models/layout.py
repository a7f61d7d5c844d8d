"""How a published model's folder is laid out, which of its files are needed, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from autoembed.errors import BrokenModel, MissingFile, RemoteCode, UnreadableModel, UnsupportedModel
from autoembed.models.manifest import DOCUMENTS

DOWNLOAD = "Download the model again; in a clone, `git lfs pull` fetches what is still missing."
IS_NO_FILE = "is not there, is a folder, or is a link that leads nowhere."
POINTER = b"version https://git-lfs.github.com/"
IS_POINTER = "is a pointer of Git-LFS and not the file itself"
READABLE = "Whoever adds a model must be able to read all of its files."
OWN_MODULES = "sentence_transformers."
WEIGHTED = ("Transformer", "Dense", "LayerNorm", "WeightedLayerPooling")
WEIGHTLESS = ("Pooling", "Normalize", "Dropout")

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
ROOT_FILES = (MODULES, SETTINGS, *DOCUMENTS)
DOCUMENT_PROMPTS = ("document", "passage", "corpus")
TOKENIZER = "tokenizer.json"
# As transformers opens it, where its other files add to tokenizer.json; written by `model add`.
EFFECTIVE_TOKENIZER = "autoembed-tokenizer.json"
VOCABULARIES = ("vocab.txt", "vocab.json", "*.model")
TRANSFORMER_SETTINGS = "sentence_*_config.json"
TRANSFORMER_FILES = (
    "config.json",
    TRANSFORMER_SETTINGS,
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    *VOCABULARIES,
)
MODULE_FILES = ("config.json",)

SAFETENSORS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
PICKLED = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin")
INDEX = "model.safetensors.index.json"

# Their position ids start after the padding token's id, so that fewer tokens fit than there are positions.
OFFSET_POSITIONS = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "mpnet",
    "roberta-prelayernorm",
    "longformer",
)


@dataclass(frozen=True)
class Module:
    kind: str
    path: str

    @property
    def has_weights(self) -> bool:
        return self.kind in WEIGHTED


@dataclass(frozen=True)
class Layout:
    """A folder that passed all checks; `bare` is one in transformers' format, without modules of its own."""

    name: str
    folder: Path
    modules: tuple[Module, ...]
    config: Mapping[str, Any]
    bare: bool
    truncate_dim: int | None = None
    """Only so many first numbers of a vector are kept (Matryoshka representations)."""

    @property
    def transformer(self) -> Path:
        return self.folder / self.modules[0].path

    @property
    def architecture(self) -> str:
        return str(self.config["model_type"])

    @property
    def normalizes(self) -> bool:
        return self.modules[-1].kind == "Normalize" and self.truncate_dim is None

    @property
    def position_limit(self) -> int | None:
        """Returns the most tokens that the model has positions for; None where positions are relative."""
        positions = self.config.get("max_position_embeddings")
        if not isinstance(positions, int) or positions < 1:
            return None
        if self.architecture in OFFSET_POSITIONS:
            padding = self.config.get("pad_token_id")
            return positions - 1 - (1 if padding is None else int(padding))
        return positions


def inspect(folder: Path, name: str) -> Layout:
    if not folder.is_dir():
        raise MissingFile(name=name, file=f"folder {folder}")
    bare = not _is_named(folder / MODULES)
    modules = (Module("Transformer", ""),) if bare else _modules(folder, name)
    transformer = folder / modules[0].path
    _refuse_code(transformer, name)
    _refuse_elsewhere(transformer, name)
    config = read_object(transformer / "config.json", name)
    if "model_type" not in config:
        raise UnsupportedModel(name=name, reason="its config.json names no model_type")
    prompts(folder, name)
    return Layout(name, folder, modules, config, bare, _truncate_dim(folder, name))


def read_json(path: Path, name: str) -> Any:
    try:
        content = path.read_bytes()
        if content.startswith(POINTER):
            raise BrokenModel(name=name, reason=f"{path.name} {IS_POINTER}", hint=DOWNLOAD)
        return json.loads(content.decode("utf-8"))
    except FileNotFoundError:
        raise MissingFile(name=name, file=path.name, hint=f"Looked for {path}.") from None
    except OSError as error:
        raise UnreadableModel(path=path, reason=error.strerror, hint=READABLE) from None
    except (ValueError, RecursionError):
        raise BrokenModel(name=name, reason=f"{path.name} is not JSON", hint=DOWNLOAD) from None


def read_object(path: Path, name: str) -> dict[str, Any]:
    content = read_json(path, name)
    if not isinstance(content, dict):
        raise BrokenModel(name=name, reason=f"{path.name} is no JSON object", hint=DOWNLOAD)
    return content


def choose_weights(names: Iterable[str]) -> list[str]:
    """Returns one directory's weights: safetensors if there are any, else pickles, else nothing."""
    names = sorted(names)
    safe = [name for name in names if SAFETENSORS.fullmatch(name)]
    if "model.safetensors" in safe:
        return ["model.safetensors"]
    if safe:
        return [*safe, INDEX]
    pickled = [name for name in names if PICKLED.fullmatch(name)]
    return ["pytorch_model.bin"] if "pytorch_model.bin" in pickled else pickled


def tokenizer_file(layout: Layout) -> Path:
    effective = layout.folder / EFFECTIVE_TOKENIZER
    return effective if effective.is_file() else layout.transformer / TOKENIZER


def is_pickled(file: str) -> bool:
    return PICKLED.fullmatch(PurePosixPath(file).name) is not None


def needed_files(layout: Layout) -> list[str]:
    """Returns what the model is made of, relative to its folder: no code, no other frameworks' weights."""
    found = {file for pattern in ROOT_FILES for file in _matching(layout, "", pattern)}
    for module in layout.modules:
        patterns = TRANSFORMER_FILES if module.kind == "Transformer" else MODULE_FILES
        found.update(file for pattern in patterns for file in _matching(layout, module.path, pattern))
        if module.has_weights:
            found.update(_weights(layout, module))
    return sorted(found)


def prompts(folder: Path, name: str) -> tuple[dict[str, str], str | None]:
    """Returns the model's prompts and its default prompt's name. `query` and `document` are always there.

    An author who names a prompt `passage` or `corpus`, and none `document`, means it for documents. That is what
    sentence-transformers' encode_document says of itself, too, but 6.2 gives documents no prompt then.
    """
    config = _settings(folder, name)
    named = _named_prompts(config, name)
    document = next((named[key] for key in DOCUMENT_PROMPTS if key in named), "")
    default = config.get("default_prompt_name")
    if default is not None and default not in named:
        raise BrokenModel(name=name, reason=f'its default prompt "{default}" is not among its prompts')
    return {"query": "", "document": document, **named}, default


def document_prompt_note(folder: Path, name: str) -> str | None:
    """Returns what is to be said where documents get a prompt of another name."""
    named = _named_prompts(_settings(folder, name), name)
    used = next((key for key in DOCUMENT_PROMPTS if key in named), DOCUMENT_PROMPTS[0])
    if used == DOCUMENT_PROMPTS[0]:
        return None
    return f'documents get its prompt "{used}", which sentence-transformers\' encode_document leaves out'


def _settings(folder: Path, name: str) -> dict[str, Any]:
    path = folder / SETTINGS
    return read_object(path, name) if _is_named(path) else {}


def _named_prompts(config: Mapping[str, Any], name: str) -> dict[str, str]:
    named = config.get("prompts") or {}
    if not isinstance(named, dict) or not all(isinstance(text, str | None) for text in named.values()):
        raise BrokenModel(name=name, reason=f"{SETTINGS} has prompts that are no texts", hint=DOWNLOAD)
    return {key: text or "" for key, text in named.items()}


def _truncate_dim(folder: Path, name: str) -> int | None:
    wanted = _settings(folder, name).get("truncate_dim")
    if wanted is not None and (not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1):
        raise BrokenModel(name=name, reason=f"{SETTINGS} has a truncate_dim that is no number of dimensions")
    return wanted


def _modules(folder: Path, name: str) -> tuple[Module, ...]:
    kind = _settings(folder, name).get("model_type")
    if kind not in (None, "SentenceTransformer"):
        raise UnsupportedModel(name=name, reason=f"it is a {kind}, which gives no dense vectors of texts")
    listed = read_json(folder / MODULES, name)
    try:
        modules = tuple(_module(each["type"], each["path"], name) for each in listed)
    except (TypeError, KeyError, AttributeError):
        raise BrokenModel(name=name, reason=f"{MODULES} is damaged", hint=DOWNLOAD) from None
    if not modules or modules[0].kind != "Transformer":
        raise UnsupportedModel(name=name, reason="its first module is not a Transformer")
    return modules


def _module(kind: str, path: str, name: str) -> Module:
    last = kind.rsplit(".", 1)[-1]
    if not kind.startswith(OWN_MODULES):
        raise RemoteCode(name=name, reason=f"{MODULES} names {kind}")
    if last not in WEIGHTED + WEIGHTLESS or not _is_known_path(kind.removesuffix(f".{last}")):
        raise UnsupportedModel(name=name, reason=f"{MODULES} names {kind}")
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise UnsupportedModel(name=name, reason=f"{MODULES} names a path outside of the folder")
    return Module(last, path)


def _is_known_path(package: str) -> bool:
    """Knows the packages, old and new, that sentence-transformers writes for its own modules."""
    return (
        re.fullmatch(r"sentence_transformers\.(models|((base|sentence_transformer)\.)?modules)(\.\w+)?", package)
        is not None
    )


def _refuse_code(transformer: Path, name: str) -> None:
    for file in ("config.json", "tokenizer_config.json"):
        path = transformer / file
        if _is_named(path) and read_object(path, name).get("auto_map"):
            raise RemoteCode(name=name, reason=f"{file} has an auto_map")
    if (transformer / "adapter_config.json").is_file():
        hint = "Merge the adapter into its base model first (peft's merge_and_unload), and add the result."
        raise UnsupportedModel(name=name, reason="it is an adapter of another model", hint=hint)


def _refuse_elsewhere(transformer: Path, name: str) -> None:
    for path in transformer.glob(TRANSFORMER_SETTINGS):
        if read_object(path, name).get("tokenizer_name_or_path"):
            raise UnsupportedModel(name=name, reason=f"{path.name} names a tokenizer outside of the folder")


def _is_named(path: Path) -> bool:
    """Says yes also to a link that leads nowhere, as in a cache with holes: that is an error, and no absence."""
    return path.is_symlink() or path.exists()


def _matching(layout: Layout, path: str, pattern: str) -> list[str]:
    """Returns the files that fit a pattern. A folder that may not be read is an error, which glob passes over."""
    directory = layout.folder / path
    if directory.is_dir():
        next(directory.iterdir(), None)
    found = [file for file in directory.glob(pattern) if "*" not in pattern or not file.is_dir()]
    for file in found:
        if not file.is_file():
            raise MissingFile(name=layout.name, file=file.name, hint=f"{file} {IS_NO_FILE}")
    return [file.relative_to(layout.folder).as_posix() for file in found]


def _weights(layout: Layout, module: Module) -> list[str]:
    directory = layout.folder / module.path
    chosen = choose_weights(file.name for file in directory.iterdir()) if directory.is_dir() else []
    if not chosen:
        raise MissingFile(
            name=layout.name,
            file=f"model.safetensors or pytorch_model.bin in {directory}",
            hint="Weights of other frameworks (onnx, tensorflow, flax) are not read.",
        )
    missing = [file for file in chosen if not (directory / file).is_file()]
    if missing:
        raise MissingFile(name=layout.name, file=missing[0], hint=f"{directory / missing[0]} {IS_NO_FILE}")
    return [(PurePosixPath(module.path) / file).as_posix() for file in chosen]
