"""Formats of logs.

In: the path of a file and how it is written. Out: a `Table`: the names of its columns and the SQL
that reads them as text. A format with more than one part has its own file.
Read first: reader.py defines what a format is; registry.py lists all of them by name.
"""
