"""Mosaics: photos of any other source on one large canvas, each at a place that texts can name."""
