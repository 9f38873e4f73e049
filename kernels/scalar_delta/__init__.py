"""The delta rule whose matrix state fades by one number a head and token, or not at all."""
