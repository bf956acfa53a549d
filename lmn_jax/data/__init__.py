"""Any log to batches.

In: a log of any format (`config.data`). Out: a history store on disk, and seeded batches of it for
both tasks, cut on the host or on the devices. Rows of other files and new events are matched with a
store here, too.
Read first: interactions.py, then prepare.py, store.py, batches.py, lanes.py and resident.py.
"""
