"""``python -m regfused`` prints what was built and what of it is in use."""

from regfused import build_info

print(build_info())
