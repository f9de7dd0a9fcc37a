"""Trackers: CSV, TensorBoard, Trackio and Weights & Biases, fed from the events of a run."""
