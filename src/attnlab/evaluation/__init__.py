"""What a trained model is worth: perplexity of held-out text, and exams on synthetic tasks."""
