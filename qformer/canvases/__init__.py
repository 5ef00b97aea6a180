"""Canvases: drawn pictures whose objects keep their size in pixels; texts about them, pairs, clips, rows of two."""
