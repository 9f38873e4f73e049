"""How an older database becomes a newer one: a module a version, listed in the open, run by Alembic's operations.

Whoever changes `storage.tables` raises its version, adds a module here that leads to it, lists it in `versions`, and keeps
a database of the new version among the tests' data with the script that lies there.
"""
