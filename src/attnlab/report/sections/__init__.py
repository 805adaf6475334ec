"""The sections of the report, one file each: its words, its table, its figure."""
