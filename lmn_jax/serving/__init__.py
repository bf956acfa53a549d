"""The HTTP service of an exported folder.

In: requests with users, candidates and new events. Out: scores, recommendations, stored users, and
metrics for Prometheus. A newer export is loaded while the old one answers.
Read first: server.py for the processes, then api.py and service.py.
"""
