"""Click models: the log-odds that a user clicks an item.

In: the embedded fields of a batch. Out: the features of an encoder for each candidate. All models
share one head. Each file has one model.
Read first: base.py, then din.py as a short example.
"""
