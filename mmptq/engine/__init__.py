"""WHEN it happens in a Runner."""
