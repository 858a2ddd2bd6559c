"""Metrics, tables, plots and reports, rebuilt from run records alone."""
