"""The page: ask a picture."""
