"""Published benchmarks of seeing and reading, asked and scored as their authors do."""
