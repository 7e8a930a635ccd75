"""Measures codecs on images, and converts image files."""
