"""The generalised delta rule: a matrix state that fades by channel and is corrected by one rank a token (RWKV-7)."""
