"""Comparison of systems: the same data, seeds and steps for all of them, what each costs, and at equal cost."""
