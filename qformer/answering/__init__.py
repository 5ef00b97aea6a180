"""Whoever answers questions about pictures: our checkpoints, models of transformers, OpenAI-compatible servers."""
