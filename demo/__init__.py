"""The page: ask a picture."""

if __name__ != "qformer.demo":  # else its modules could be there twice
    raise ImportError("the folder 'demo' is the package qformer.demo: import it by that name")
