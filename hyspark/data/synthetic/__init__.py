"""Phantom CTs with labels."""
