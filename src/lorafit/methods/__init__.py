"""The methods that `train --method` knows: attach, state, merge."""
