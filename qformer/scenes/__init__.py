"""Drawn scenes: worlds of shapes and words, the texts about them, and stories for language models."""
