"""One file a sequence mixer: what it is, its settings, its price, its module. No mixer knows another."""
