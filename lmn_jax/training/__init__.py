"""Trains one experiment.

In: a config and a store. Out: checkpoints, metrics.jsonl, TensorBoard events and a report in the
workdir of the run. A stopped run continues with the same results, bit for bit.
Read first: loop.py, the training loop; program.py, what is compiled; update.py, one step.
"""
