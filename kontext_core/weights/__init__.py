"""Weight files: what a file is, strict loading from the memory map, conversion, quantisation, offload."""
