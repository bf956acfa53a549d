"""The loader of an exported folder; every export contains a copy of it.

In: an exported folder. Out: scores, recommendations and states of users, with JAX and NumPy only.
It imports nothing of lmn_jax but modules that are copied too (`copies.COPIED`).
Read first: bundle.py.
"""
