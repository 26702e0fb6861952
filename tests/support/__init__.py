"""Real parts for the tests: servers, the Litestream writer, sample databases and live workloads."""
