"""Rack, Stack and Block, and the parts they are made of."""
