"""What everyone may use; imports nothing else of the project."""
