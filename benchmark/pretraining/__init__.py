"""Makes the bundled weights again: `dualcl pretrain`."""
