"""Reads images from disk and cuts numbered crops from them."""
