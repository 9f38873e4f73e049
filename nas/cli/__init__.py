"""One file a command, which reads arguments, calls and prints; beside them what they print, and the course of a search."""
