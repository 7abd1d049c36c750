"""Finished runs into tables and pictures."""
