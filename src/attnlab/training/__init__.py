"""Training: the loop, its steps, and the strategies by which processes share them."""
