"""Linear recurrences whose matrix state fades by one number a key channel and token (GLA, HGRN2, RWKV-6)."""
