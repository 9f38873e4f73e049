"""Searches as jobs of a Ray cluster: what is shipped, under which id, and how a cluster is asked."""
