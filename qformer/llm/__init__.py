"""Frozen language models: prompts, losses, generation, adapters and quantization."""
