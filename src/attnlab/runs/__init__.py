"""What a run leaves on the disk, and the processes that leave it."""
