"""Serving: requests, their admission, and continuous batching over one cache."""
