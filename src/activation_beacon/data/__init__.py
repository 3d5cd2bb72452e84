"""Texts and questions as they stand on disk: which files a source names, their records, and statements hidden in a text."""
