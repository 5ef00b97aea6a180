"""MMVP and MMVP-VLM in their published folders."""
