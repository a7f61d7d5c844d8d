"""Models without weights, which need no torch: the encoder of faults/sitecustomize.py serves them."""

from __future__ import annotations

from pathlib import Path

from autoembed.models import manifest as manifests
from autoembed.models.manifest import Manifest, Origin

FAULTS = Path(__file__).parent / "faults"


def add_stub(directory: Path, name: str, *, dimensions: int = 384, weights: str = "") -> Path:
    """Registers a model that has no weights: the faults' encoder serves it."""
    folder = directory / name
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(weights or name)
    manifest = Manifest(
        name=name,
        architecture="stub",
        precision="float32",
        dimensions=dimensions,
        max_tokens=64,
        position_limit=64,
        normalizes=True,
        prompts={"query": "query: ", "document": ""},
        default_prompt=None,
        origin=Origin("tests", None, {}, {}),
        converted=[],
        assumed=[],
        tools={},
        added="",
        files=manifests.hash_files(folder, ["model.safetensors"]),
    )
    manifests.write(folder, manifest)
    return folder
