"""What the terminal shows: tables that fit into 80 columns, and progress."""
