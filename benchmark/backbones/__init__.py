"""Bundled pretrained weights (safetensors) with their model cards."""
