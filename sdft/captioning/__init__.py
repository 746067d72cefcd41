"""Captions of images: made by models, corrected by people, and edited by rule."""
