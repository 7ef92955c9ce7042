"""What the load generator can measure; each a `target.Target`."""
