"""Cameras that see the same rooms: each draws an image from surfaces, a viewpoint and what the rays hit."""

from .photo import draw_photo
from .thermal import draw_thermal
from .ultrasound import draw_ultrasound

CAMERAS = {"photo": draw_photo, "thermal": draw_thermal, "ultrasound": draw_ultrasound}
