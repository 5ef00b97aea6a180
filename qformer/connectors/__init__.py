"""Connectors that need no Q-Former, one file for each way to turn image tokens into embeddings of a language model.

`table.py` names all of them; `qformer.model.connectors` has the Q-Former's, and every public name.
"""
