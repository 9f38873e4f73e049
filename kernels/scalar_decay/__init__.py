"""Linear recurrences whose matrix state fades by one number a head and token (SSD form)."""
