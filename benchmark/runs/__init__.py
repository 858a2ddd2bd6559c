"""One run: the task loop, its folder, its progress."""
