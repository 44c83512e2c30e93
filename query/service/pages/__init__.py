"""The pages of the viewer: the same views as the API's, as HTML.

``router`` answers them all; ``error_page`` shows a problem. Pages are made on the server,
work without scripts, and ask no other origin for anything.
"""

from actstore.query.service.pages.rendering import error_page
from actstore.query.service.pages.site import router

__all__ = ["error_page", "router"]
