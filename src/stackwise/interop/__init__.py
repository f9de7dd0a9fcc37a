"""Models of other programs, in and out: Hugging Face folders, per family."""
