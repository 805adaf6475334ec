"""Inference: from a model and a prompt to tokens and text."""
