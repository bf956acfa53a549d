"""LMN's memory values on other machines.

In: ids and weights of memory slots. Out: weighted sums of their values. Each shard sums its own
rows; a shard that does not answer is left out, and answers are marked as degraded.
Read first: client.py, which describes the message; server.py is the process of a shard.
"""
