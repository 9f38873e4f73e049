"""Reads records and draws them: the report, the pages, the charts. Never trains, never writes results."""
