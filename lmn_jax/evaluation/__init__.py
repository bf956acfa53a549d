"""Metrics, rankings and baselines of a split.

In: a function that scores a batch, and the batches of a split. Out: metrics overall and by length
of the history, baselines without a model, the best items, and files of scored rows.
Read first: click_evaluation.py for clicks, ranking.py for next items.
"""
