"""The context model: components by slot and kind, and the order of coding."""
