"""Predictions of a trained run.

In: the best checkpoint of a run, and rows of a file, users or new events. Out: scores, the best
items of all, and the states of users, which new events bring up to date.
Read first: predict.py, then scorers.py and user_states.py.
"""
