"""Processes: devices and exchanges, starting and ending them together, signals."""
