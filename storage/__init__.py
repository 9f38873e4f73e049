"""Durable records of studies, trials and results; knows no torch and no layout class."""
