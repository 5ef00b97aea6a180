"""CapFilt: write captions for web images and filter them."""
