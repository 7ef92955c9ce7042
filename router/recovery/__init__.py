"""What the router remembers of its streams beyond its own death, and how they go on after it."""
