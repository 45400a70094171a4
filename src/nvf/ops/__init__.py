"""Arithmetic over N rows in blocks; this folder knows no model."""
