"""Refuses what sentence_bert_config.json sets, decides a vector by, and the packed encoder does not read.

Settings of the tokenizer are no concern here: `model add` has kept the tokenizer as they make it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoembed.encoding.packed.network import UnsupportedNetwork
from autoembed.models import layout as layouts
from autoembed.models.layout import Layout

READ = frozenset({"max_seq_length", "do_lower_case", "tokenizer_args", "processor_kwargs"})
INERT = frozenset({"unpad_inputs", "query_length", "document_length"})  # how texts are batched; for tasks, not prompts
OF_THE_NETWORK = ("model_args", "model_kwargs", "config_args", "config_kwargs")
INERT_OF_THE_NETWORK = frozenset({"attn_implementation", "dtype", "torch_dtype", "add_pooling_layer", "use_cache"})
DEFAULTS: Mapping[str, Any] = {
    "transformer_task": "feature-extraction",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}


def refuse(layout: Layout) -> None:
    """Raises UnsupportedNetwork for a setting that only sentence-transformers obeys."""
    for path in sorted(layout.transformer.glob(layouts.TRANSFORMER_SETTINGS)):
        for key, value in layouts.read_object(path, layout.name).items():
            if not _is_inert(key, value):
                raise UnsupportedNetwork(f"its {path.name} sets {key}")


def _is_inert(key: str, value: Any) -> bool:
    if key in READ | INERT or not value:
        return True
    if key in OF_THE_NETWORK and isinstance(value, dict):
        return value.keys() <= INERT_OF_THE_NETWORK
    return key in DEFAULTS and bool(value == DEFAULTS[key])
