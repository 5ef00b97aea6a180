"""Data sources, and the batches made from them."""
