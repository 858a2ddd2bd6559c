"""What data sets share: downloads, archives, folders, splits; and how their images become batches."""
