"""The soak runner: see `scripts/soak`."""
