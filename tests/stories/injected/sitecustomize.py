"""Loaded by every Python process of a story, whose environment says what is different there."""

import os

if os.environ.get("FEDLLM_TEST_FAULT"):
    import story_faults  # noqa: F401
if os.environ.get("FEDLLM_TEST_OVERHEARD"):
    import story_overheard  # noqa: F401
if os.environ.get("FEDLLM_TEST_ALIKE"):
    import story_alike  # noqa: F401
