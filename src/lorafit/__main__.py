"""`python -m lorafit`."""

from lorafit.cli import main

main()
