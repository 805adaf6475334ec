"""Costs of attention: measured here (bench), and planned for machines that are not here (plan, dry run)."""
