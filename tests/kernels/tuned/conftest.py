"""What is known of launches can be read without Triton; what they are chosen from cannot."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("triton") is not None else ["test_search.py"]
