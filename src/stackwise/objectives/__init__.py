"""What is learned: corruption, targets and loss."""
