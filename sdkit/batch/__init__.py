"""Batches: a grid of parameters through a notebook, on warm kernels, scheduled by Dask.

Nothing is imported here: `sdkit.batch.zygote` runs as a process of its own, and what it imports is
in every kernel that it forks.
"""
