"""Files: every write to a disk, in one place."""
