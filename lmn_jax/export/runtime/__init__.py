"""The loader of an exported folder, which has a copy of it.

In: an exported folder. Out: scores, recommendations and states of users, with JAX and NumPy alone.
It imports nothing of lmn_jax but files that are copied with it (`copies.COPIED`).
Read first: bundle.py.
"""
