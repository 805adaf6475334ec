"""A run: its folder on the disk, and the processes that train it."""
