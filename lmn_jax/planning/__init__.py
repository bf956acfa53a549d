"""What a training step needs on hardware that is not at hand.

In: a config, a store and the name of a TPU slice. Out: bytes, collectives and the time of a step,
from the program compiled for that slice.
Read first: plan.py.
"""
