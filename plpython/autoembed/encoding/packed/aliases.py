"""Gives near relatives of BERT its words: what differs is how they name their settings and weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Published weights are often those of a model with a head, below its name.
PREFIX = re.compile(r"^(bert|roberta|mpnet|distilbert|electra)\.")
SETTINGS = {
    "distilbert": {
        "dim": "hidden_size",
        "hidden_dim": "intermediate_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "activation": "hidden_act",
    }
}
"""DistilBERT (Sanh et al. 2019); no key has a default of BERT's there."""
LAYER = re.compile(r"^transformer\.layer\.(\d+)\.(attention\.\w+_lin|ffn\.lin\d|sa_layer_norm|output_layer_norm)\.")
PARTS = {
    "attention.q_lin": "attention.self.query",
    "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value",
    "attention.out_lin": "attention.output.dense",
    "sa_layer_norm": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense",
    "output_layer_norm": "output.LayerNorm",
}


def config(published: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns config.json with BERT's keys. A missing one raises KeyError where its default is not BERT's."""
    names = SETTINGS.get(str(published["model_type"]), {})
    return {**published, **{name: published[key] for key, name in names.items()}}


def weight(published: str) -> str:
    """Returns BERT's name of a weight, where it has one."""
    name = PREFIX.sub("", published)
    return LAYER.sub(lambda found: f"encoder.layer.{found[1]}.{PARTS[found[2]]}.", name)
