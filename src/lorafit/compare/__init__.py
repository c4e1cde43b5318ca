"""`lorafit compare`: which method for these rows, and whether the difference is real. Read `line.py` first."""
