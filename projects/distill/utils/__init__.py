"""Helpers without knowledge of detection."""
