"""Paged caches in other libraries' models."""
