"""Formats of logs.

In: the path of a file and how it is written. Out: a `Table`: the names of its columns, and the SQL
that reads them as text. A format with more than one part has a file of its own.
Read first: reader.py, what a format is; registry.py has all of them by name.
"""
