"""Several hosts and many devices.

In: the flags of a command, Slurm's environment, the devices that JAX sees. Out: processes that have
joined and agree, the mesh with its PartitionSpecs, and the step at which a run stops on SIGTERM.
Read first: mesh.py for devices; joining.py, then processes.py, for hosts.
"""
