"""Pages: the pool that owns them, their layout, and the tables that map sequences to them."""
