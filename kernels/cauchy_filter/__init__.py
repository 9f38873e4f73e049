"""Filters of state spaces that are diagonal but for a matrix of rank one (S4), made from Cauchy sums."""
