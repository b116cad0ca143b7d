"""Adapter folders on disk: the one grammar by which every other room reads them."""
