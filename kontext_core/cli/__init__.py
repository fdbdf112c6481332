"""The commands of `python -m kontext_core`, one file each; each imports what is heavy only when it runs."""
