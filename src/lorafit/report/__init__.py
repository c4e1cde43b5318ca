"""`lorafit report` of one run: what its files hold -> tables, curves, a page. No live objects."""
