"""Collectors: they make real traces anew, by crawling a site or by searching an index."""
