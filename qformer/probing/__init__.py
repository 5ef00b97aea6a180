"""Pictures that probe how a model sees, and the attack with padding."""
