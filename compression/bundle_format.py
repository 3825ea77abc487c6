"""What a bundle calls itself, and the versions of its format: what each of them brought."""

from typing import Final

BUNDLE_KIND: Final = "exeunt-bundle"
FORMAT_VERSION: Final = 4
"""The newest that is read. A bundle is written in the oldest that says all it holds, so that older readers take it."""
CONFIRMED_VERSION: Final = 4
"""Exits may confirm by all logits what a shortlist let pass. A reader of 3 would let go whoever that lets pass."""
JUDGED_VERSION: Final = 3
"""Exits may decide by a judge, and by the logits of a shortlist. A reader of 2 would overlook both, and weigh what
their regression was not fitted to."""
PLAIN_VERSION: Final = 2
"""An exit may be there for drafts alone. A reader of 1 would let tokens of the approximate mode leave at it."""
