"""Parts of the comparison's HTML page."""
