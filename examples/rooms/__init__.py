"""Rooms with solids in them: textures, shapes, layout, ray tracing, and exact labels. scenes.py puts them together."""
