"""Helpers that do not depend on detection."""
