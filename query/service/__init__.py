"""The query service: an HTTP API, pages and SQL over one open store.

Needs the ``server`` extra. Nothing is imported here, so that the SQL worker's process and
those who only ask for the settings do not pay for the web framework.
"""
