"""What the service stores of its users.

In: the events of a user that requests bring. Out: records: the newest events, the items met and the
state of the model, in SQLite or Redis.
Read first: records.py, the interface that both stores implement.
"""
