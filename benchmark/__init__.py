"""The runner, the domains, the configuration and the command line."""

from dualcl.benchmark.core import moved  # noqa: F401 - former names of modules say where they are
