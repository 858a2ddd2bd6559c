"""`dualcl bench`: speed and memory, alone and beside public code."""
