"""A gallery of images that is searched by text or image: embedded once, kept on disk, re-ranked by matching."""
