"""Figures: pages of HTML, curves of a run, heat maps and slices."""
