"""A saved adapter: what its files say, and how they are written."""
