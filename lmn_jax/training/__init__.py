"""The training of one experiment.

In: a config and a store. Out: checkpoints, metrics.jsonl, TensorBoard events and a report in the
workdir of the run. A run that was stopped continues with the same results, bit for bit.
Read first: loop.py, the story; program.py, what is computed; update.py, where weights change.
"""
