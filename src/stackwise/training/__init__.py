"""The one loop, optimizers, schedules and runs."""
