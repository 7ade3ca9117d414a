"""A pass on several ranks that share batches: statistics are merged, and each layer is solved by one rank, for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from ... import __version__
from ...dispatch.targets import detect
from ...model.digest import data_sha256
from ...model.eligible import dense_weight
from ...model.inputs import Inputs
from ...model.products import Products
from ...model.stages import Stage
from ...parallel.ranks import Message, Ranks
from ...weights.scheme import Scheme
from ..plan import Layer
from .outcome import Outcome
from .tried import from_plain, to_plain


class Problem(NamedTuple):
    """Twins whose new weight is wanted, the schemes that it may have, and the statistics of their inputs."""

    twins: Sequence[Layer]
    schemes: tuple[Scheme | None, ...]
    inputs: Inputs | None


Solve = Callable[[Sequence[Layer], Inputs | None], Outcome | None]


def check_same(ranks: Ranks, model: nn.Module, arguments: object) -> None:
    """Raise ValueError on all ranks unless all have the same weights, arguments and kind of machine."""
    ranks.agree("version of nybble", __version__)
    ranks.agree("targets (instruction sets)", ", ".join(detect().targets))
    ranks.agree("arguments", repr(arguments))
    held = [*model.named_parameters(), *model.named_buffers()]
    ranks.agree("model", data_sha256((name, one) for name, one in held if not one.is_meta))


def merged_inputs(ranks: Ranks, stage: Stage, hessian: bool, observer: str | None) -> dict[int, Inputs]:
    """As ``Stage.inputs``, of the batches of all ranks."""
    ranks.agree(f"layers in {stage.name}", ", ".join(site.name for site in stage.layers))
    found = stage.inputs(hessian, observer, offset=None if ranks.rank else 0)
    rows = [message.facts for message in ranks.gather(Message([one.added for one in found.values()]))]
    for i, one in enumerate(found.values()):
        one.settle(sum(own[i] for own in rows[: ranks.rank]))
        parts = [message.tensors for message in ranks.gather(Message(None, one.tensors()))]
        one.merge(parts, partial(_sums, ranks))
    return found


def _sums(ranks: Ranks, own: Products | None) -> Iterator[Tensor]:
    """The sums of all ranks that have some, one after another, since each takes K * K numbers."""
    for source in range(ranks.count):
        message = Message(None, {} if own is None or source != ranks.rank else {"sum": own.sum})
        yield from ranks.send(source, message).tensors.values()


def shared_numbers(ranks: Ranks | None, find: Sequence[Callable[[], float]]) -> list[float]:
    """What each function gives, in which one rank calls it; all are called here if ``ranks`` is None."""
    if ranks is None:
        return [one() for one in find]
    told = [message.facts for message in ranks.gather(Message([one() for one in find[ranks.rank :: ranks.count]]))]
    return [told[i % ranks.count][i // ranks.count] for i in range(len(find))]


def shared_outcomes(ranks: Ranks, problems: Sequence[Problem], solve: Solve) -> list[Outcome | None]:
    """What ``solve`` gives for each problem, in which one rank solves it; twins get ``reason`` and ``tried`` as there."""
    owners = _owners(problems, ranks.count)
    own = [
        _message(problem, solve(problem.twins, problem.inputs)) if owner == ranks.rank else None
        for problem, owner in zip(problems, owners, strict=True)
    ]
    told = zip(problems, owners, own, strict=True)
    return [_outcome(problem, ranks.send(owner, message)) for problem, owner, message in told]


def _owners(problems: Sequence[Problem], count: int) -> list[int]:
    """The rank that solves each problem: the costliest first, each to the rank with the least to do so far."""
    load, owners = [0] * count, [0] * len(problems)
    shapes = [dense_weight(problem.twins[0].site.module).shape for problem in problems]
    # A search for scales takes time by the weight, a sweep by the input channel, about as for that many weights.
    costs = [n * k + 400 * k for n, k in shapes]
    for i in sorted(range(len(problems)), key=lambda one: -costs[one]):
        owners[i] = load.index(min(load))
        load[owners[i]] += costs[i]
    return owners


def _message(problem: Problem, outcome: Outcome | None) -> Message:
    first = problem.twins[0]
    facts = {"reason": first.reason, "tried": to_plain(first.tried)}
    if outcome is None:
        return Message({**facts, "scheme": None})
    own = {"method": outcome.method, "notes": outcome.notes, "scheme": problem.schemes.index(outcome.scheme)}
    return Message({**facts, **own}, outcome.tensors())


def _outcome(problem: Problem, message: Message) -> Outcome | None:
    facts = message.facts
    for layer in problem.twins:
        layer.reason, layer.tried = facts["reason"], from_plain(facts["tried"]) or ()
    if facts["scheme"] is None:
        return None
    scheme = problem.schemes[facts["scheme"]]
    return Outcome.of_tensors(message.tensors, facts["method"], tuple(facts["notes"]), scheme)
