"""Stores on servers: reading part by part, a cache of parts, publishing; a file for each kind of server."""
