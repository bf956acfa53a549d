"""The store of the service's users, in SQLite or Redis.

In: new events of users, from requests. Out: records of users: the newest events, the items met and
the state of the model.
Read first: records.py, the interface of both stores; history.py places new events among old ones.
"""
