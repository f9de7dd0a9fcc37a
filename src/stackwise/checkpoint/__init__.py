"""The content-addressed checkpoint store."""
