"""Devices, processes and stop requests."""
