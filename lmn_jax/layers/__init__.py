"""Parts of models: pure functions and small modules, each with its equation and its source.

In: arrays, with a suffix for each axis of their shapes. Out: arrays. No tables, no config.
Read first: basic.py, then the part that a model imports.
"""
