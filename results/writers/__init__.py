"""Forms of a report, a file each: the tables with their differences, and published numbers in tables of their own."""
