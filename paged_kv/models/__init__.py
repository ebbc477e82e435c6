"""Language models that keep their keys and values in a paged_kv cache."""
