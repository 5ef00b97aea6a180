"""Checkpoints: our folders, files of LAVIS and folders of transformers, read, written and turned into models."""
