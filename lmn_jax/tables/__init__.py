"""Embedding tables, stored beside the model instead of in its parameters.

In: a `TableSpec` for each table, and ids. Out: rows, or weighted sums of rows, sharded over the
mesh; and an update of the rows that a training step has read.
Read first: spec.py and table.py, then reader.py, which a model calls as `read(name, ids)`.
"""
