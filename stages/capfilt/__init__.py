"""CapFilt: captions of web images, written and filtered."""
