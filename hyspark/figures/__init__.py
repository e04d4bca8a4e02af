"""Figures with matplotlib, without pyplot."""
