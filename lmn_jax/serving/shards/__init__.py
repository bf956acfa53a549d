"""LMN's memory values on other machines.

In: ids and weights of memory slots. Out: sums of their values, each shard adding up its own rows; a
shard that does not answer is counted as missing.
Read first: client.py, which describes the message; server.py is the process of a shard.
"""
