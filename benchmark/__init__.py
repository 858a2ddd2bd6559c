"""The runner, the domains, the configuration and the command line."""
