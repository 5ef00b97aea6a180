"""The models: Q-Former, stage one, stage two, and how they are assembled."""
