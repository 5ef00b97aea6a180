"""Frozen language models: what they read, how they write, and in how many bits."""
