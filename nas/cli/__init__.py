"""One file a command: reads arguments, calls one function, prints. No logic of its own."""
