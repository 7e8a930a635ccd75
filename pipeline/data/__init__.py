"""Images on disk, and crops of them by number."""
