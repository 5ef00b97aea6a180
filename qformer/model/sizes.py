"""Names of the sizes of a Q-Former in the configuration of a BERT, in a file that is read without torch."""

from __future__ import annotations

#: Sizes that a Q-Former takes from the BERT it starts from, with their names in BERT's configuration.
BERT_SIZES = {
    "hidden_size": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "layer_norm_eps": "layer_norm_eps",
}
