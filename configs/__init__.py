"""YAML files of whole runs, found by path and never imported."""
