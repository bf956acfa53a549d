"""The HTTP service of an exported folder.

In: requests with users, candidates and new events. Out: scores, recommendations, stored users, and
metrics for Prometheus. A newer export is opened while the old one still answers.
Read first: server.py for the processes, then api.py and service.py.
"""
