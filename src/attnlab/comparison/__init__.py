"""Mechanisms compared: which runs there are, where they are made, what can be told apart."""
