"""YAML files of whole runs, found by path and never imported."""

if __name__ != "qformer.configs":  # else its modules could be there twice
    raise ImportError("the folder 'configs' is the package qformer.configs: import it by that name")
