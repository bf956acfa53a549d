"""A trained model as one folder.

In: the best checkpoint of a run and its store. Out: a sealed folder with functions of jax.export,
tables, vocabularies, histories and its own loader.
Read first: export.py; the layout of the folder is described in runtime/bundle.py.
"""
