"""Click models: the log-odds that a user clicks an item.

In: the embedded fields of a batch. Out: what an encoder makes of the history for each candidate;
the head is the same for all. One model a file.
Read first: base.py, then din.py as a short example.
"""
