"""Named sets of adapters on the linear layers of stacks."""
