# What cffi makes of csrc/fleece.h: see there for every declaration.
from typing import Any

ffi: Any
lib: Any
