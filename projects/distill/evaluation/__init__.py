"""Evaluators and metrics that detectron2 lacks."""
