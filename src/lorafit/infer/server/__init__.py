"""The server behind `lorafit serve`: requests, what computes the answers, and HTTP."""
