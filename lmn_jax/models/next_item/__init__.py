"""Next-item models: a vector of the user after each event.

In: the events of a segment and the carried state. Out: vectors, whose products with the rows of the
items are the scores, and the new carried state. Each file has one model.
Read first: base.py, then gru4rec.py as a short example.
"""
