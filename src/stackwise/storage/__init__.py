"""Files: every write to a disk in one place, and what is read from elsewhere checked before anything is made of it."""
