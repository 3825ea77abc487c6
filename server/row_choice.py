"""What a sequence computes in its next pass: some of its prompt, a decode step, drafts. Plain Python, no torch."""

from typing import Final

from exeunt.server.drafting import LOOKUP, Drafter, Proposal
from exeunt.server.pages import PagePool
from exeunt.server.row import Row
from exeunt.server.sequence import Sequence

_GO_DEEP: Final = Proposal()


def next_row(sequence: Sequence, most: int, *, max_owed: int, pool: PagePool, drafts: bool = True) -> Row:
    """The next pass of a sequence: up to `most` tokens of its prefill, or a decode step.

    Drafts that were looked up are added to the sequence; they take no more pages than `pool` has. A sequence that
    has `max_owed` positions waiting in front of deeper stages goes deep and takes them along; without `drafts` so does
    every one of the verified mode.
    """
    if sequence.scoring or sequence.prefilling:
        positions = list(sequence.next_positions(most))
        threshold = sequence.exits.threshold if sequence.scoring else None
        return Row(sequence, positions, positions[-1] + 1, threshold=threshold)
    if sequence.drafter is not None:
        if not drafts and sequence.room > 0:
            return _row_of(sequence, _GO_DEEP)
        return _drafting_row(sequence, sequence.drafter, most, max_owed, pool)
    tokens = len(sequence.tokens)
    threshold = sequence.exits.threshold if tokens > sequence.prompt_tokens else None
    return Row(sequence, [tokens - 1], tokens, deep=sequence.owes >= max_owed, threshold=threshold)


def _drafting_row(sequence: Sequence, drafter: Drafter, most: int, max_owed: int, pool: PagePool) -> Row:
    """The next step of a sequence whose exits are drafts; drafts that were looked up are taken in.

    These are guesses: they get what is left of the tick's `most` tokens and of the free pages, and displace nobody.
    So a row with guesses always finds room, and the tick that asked for it runs it.
    """
    if sequence.room <= 0:  # nothing more can follow: what waits is to be confirmed
        return Row(sequence, [], sequence.computed, stage=min(sequence.pending), deep=True)
    return _row_of(sequence, _proposal(sequence, drafter, most, max_owed, pool))


def _row_of(sequence: Sequence, proposal: Proposal) -> Row:
    start = len(sequence.tokens) - 1
    sequence.tokens += proposal.tokens
    sequence.drafts += [LOOKUP] * len(proposal.tokens)
    positions = list(range(start, len(sequence.tokens)))
    threshold = None if proposal.tokens else proposal.threshold
    return Row(sequence, positions, positions[-1] + 1, deep=threshold is None, threshold=threshold)


def _proposal(sequence: Sequence, drafter: Drafter, most: int, max_owed: int, pool: PagePool) -> Proposal:
    """What the drafter proposes, cut to what there is room for."""
    room, owes = sequence.room, sequence.owes
    if room <= 1 or owes >= max_owed or len(sequence.tokens) <= sequence.prompt_tokens:
        return _GO_DEEP
    proposal = drafter.propose(sequence.tokens, len(sequence.drafts), room - 1)
    if proposal.tokens:
        proposal = Proposal(proposal.tokens[: max(most - owes - 1, 0)])
    if sequence.table.missing(len(sequence.tokens) + len(proposal.tokens)) > pool.free:
        proposal = Proposal(threshold=proposal.threshold)
    return proposal
