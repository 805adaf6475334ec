"""Comparison of mechanisms: the grid of runs, the engines that make them, and the verdicts."""
