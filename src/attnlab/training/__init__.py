"""Training: one step, the loop around it, and how a step is shared out among processes."""
