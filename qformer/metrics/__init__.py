"""Measures of what words are worth: tokens, lemmas, intervals."""
