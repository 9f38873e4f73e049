"""The delta rule whose matrix state fades by one number a key channel and token (KDA)."""
