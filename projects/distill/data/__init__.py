"""Data sets: synthetic scenes, registration and mappers."""
