"""The models of both tasks, and the registry that builds a model from a config.

In: a batch and `read(name, ids)`. Out: `Outputs`: scores or vectors, losses, and the state that is
carried to the next batch. A model never holds a table.
Read first: base.py, then ctr/base.py or next_item/base.py; registry.py lists the models.
"""
