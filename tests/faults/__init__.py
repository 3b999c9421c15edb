"""Faults are injected into real trainings, which have to recover from each; see reliability.md."""
