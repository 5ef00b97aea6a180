"""Commands that print: caption and ask, index and search, push."""
