"""Many runs: comparisons, sweeps, engines, the state of a grid, the ledger."""
