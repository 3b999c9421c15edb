"""Data sets: synthetic scenes, registration, checks and mappers.

To add a data set with a layout of its own, register it as :mod:`.kitti` does.
"""
