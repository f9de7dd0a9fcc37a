"""Parameters, FLOPs and bytes before anything runs."""
