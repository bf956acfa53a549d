"""A trained model as one folder.

In: the best checkpoint of a run, and its store. Out: a sealed folder with functions of jax.export,
tables, vocabularies, histories and a copy of the loader.
Read first: export.py; runtime/manifest.py describes the folder, runtime/bundle.py loads it.
"""
