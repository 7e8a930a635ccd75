"""What a codec achieves on images and files."""
