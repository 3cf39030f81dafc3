"""What each of several processes runs, and what one process runs to compare."""
