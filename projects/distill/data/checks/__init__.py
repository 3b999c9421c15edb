"""Checks of images and annotations before and during a training."""
