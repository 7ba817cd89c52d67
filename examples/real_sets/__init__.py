"""Public sets of real pictures, each from a clone of its repository; real_data.py writes them as folders."""

from .leaves import LEAVES
from .nuclei import NUCLEI
from .room import ROOM
from .street import STREET

SETS = {"nuclei": NUCLEI, "leaves": LEAVES, "street": STREET, "room": ROOM}
