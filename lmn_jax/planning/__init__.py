"""Estimates what a training step needs on TPU slices, without having them.

In: a config, a store and the name of a TPU slice. Out: bytes, collectives and the time of a step,
from the program compiled for that slice.
Read first: plan.py.
"""
