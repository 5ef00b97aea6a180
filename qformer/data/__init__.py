"""Where samples come from, how they become batches."""
