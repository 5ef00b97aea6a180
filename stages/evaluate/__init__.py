"""Evaluation of a checkpoint: retrieval, and what a language model says."""
