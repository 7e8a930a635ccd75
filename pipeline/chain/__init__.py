"""Which stages run, when and why; one stage from its inputs to its publication."""
