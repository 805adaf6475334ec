"""Evaluation of trained models: perplexity of held-out text, and exams on synthetic tasks."""
