"""Parts of models: pure functions and small modules, each with its equation and its source.

In: arrays; a suffix of each name gives the axes of its shape. Out: arrays. No tables, no config.
Read first: basic.py, then the files that a model imports.
"""
