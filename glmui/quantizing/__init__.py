"""A smaller folder out of a published one, and what fewer bits cost."""
