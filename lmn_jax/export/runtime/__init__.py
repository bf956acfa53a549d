"""The loader that is copied into every exported folder.

In: an exported folder. Out: scores, recommendations and states of users, with JAX and NumPy alone.
It imports nothing of lmn_jax but files that are copied with it (`export.COPIED`).
Read first: bundle.py.
"""
