"""Pretrained networks: one file per family, and what families share."""
