"""Atomic writes and file formats; this folder knows only errors."""
