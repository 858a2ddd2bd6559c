"""How images are read: views, loaders, caches, downloads, checks."""
