"""Measures that detectron2 lacks."""
