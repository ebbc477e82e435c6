"""The commands of paged-kv, and what they report."""
