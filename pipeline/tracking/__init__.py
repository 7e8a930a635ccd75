"""MLflow: the store, the outbox, the records read back."""
