"""Predictions of a trained run.

In: the best checkpoint of a run, and rows of a file, or new events of users. Out: scores of pairs,
the best of all items, and the states of users, which new events update.
Read first: predict.py, then scorers.py and user_states.py.
"""
