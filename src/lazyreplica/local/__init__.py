"""The local copy of a replica, in files: what they hold, how they change, and how processes share them.

directory      the files' directory: who uses it, who owns it, what is swept, where the database appears
state          which files make the copy, and what it is a copy of
control        memory that all processes on it share
copy           pages at any state from the base's to the newest
base           the database file, and which pages of it are here
deltalog       the transactions after the base
continuation   does a listing go on from where the copy ends?
"""
