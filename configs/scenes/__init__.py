"""Runs on drawn scenes: everything from scratch, offline."""
