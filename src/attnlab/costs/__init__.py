"""What attention costs: measured here (bench), and foreseen for machines that are not here (plan, dry run)."""
