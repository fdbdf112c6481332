"""FLUX.1 Kontext in PyTorch: generate and edit images by instruction, train, distil and evaluate."""

__version__ = "0.1.0"
