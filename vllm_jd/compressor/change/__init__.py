"""Stores that change: adding, removing, recompressing, comparing, exporting."""
