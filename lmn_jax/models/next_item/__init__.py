"""Next-item models: a vector of the user after each event.

In: the events of a segment and what was carried so far. Out: vectors, whose products with the
items' rows are the scores, and what is carried on. One model a file.
Read first: base.py, then gru4rec.py as a short example.
"""
