"""The serial pattern search that psfast replaces: the oracle of its tests, and the slow side
of its benchmarks."""

import random
from collections.abc import Callable

import torch
from torch import Tensor

from psfast.checks import check_count, check_number
from psfast.flat import trainable
from psfast.search import derive_seed, poll_order


class ReferencePatternSearch(torch.optim.Optimizer):
    """Pattern search as a plain loop over parameters, one closure call a trial point.

    For each entry (coordinate, sign) of the poll: change the element by the radius, evaluate,
    return if the loss is strictly lower, else take the change back. If the whole list fails,
    halve the radius. A best loss of exactly 0 ends the search (Hooke & Jeeves 1961, without
    the pattern move).

    Each option below is a fault of the original, kept by default so that its results can be
    repeated. With all of them False, it decides exactly as ``psfast.PatternSearch`` does as long
    as the losses are finite.

    radius: the first step length, > 0
    seed: of the order and, without ``fresh_masks``, of the dropout masks
    reshuffle: shuffle a list of all 2N entries in every step; else walk a keyed permutation
    carry_loss: compare with the best loss of earlier minibatches; else re-evaluate
    fresh_masks: a new dropout mask for every trial point; else one for a whole poll
    subtract_to_restore: restore by ``-= radius``, which drifts; else by the saved value
    perturb_frozen: change parameters with ``requires_grad=False`` too
    stateless: ``state_dict`` holds no radius, loss or order, and loading one raises
    """

    def __init__(
        self,
        params,
        radius: float = 1.0,
        *,
        seed: int = 0,
        reshuffle: bool = True,
        carry_loss: bool = True,
        fresh_masks: bool = True,
        subtract_to_restore: bool = True,
        perturb_frozen: bool = True,
        stateless: bool = True,
    ):
        check_number("radius", radius, above=0.0)
        check_count("seed", seed, least=0)
        super().__init__(params, {})
        self.radius = radius
        self.seed = seed
        self.reshuffle = reshuffle
        self.carry_loss = carry_loss
        self.fresh_masks = fresh_masks
        self.subtract_to_restore = subtract_to_restore
        self.stateless = stateless
        self.best_loss: float | None = None
        self.evaluations = 0
        params = [p for group in self.param_groups for p in group["params"]]
        self._params = list(dict.fromkeys(params)) if perturb_frozen else trainable(params)
        self._list_places()
        self._random = random.Random(seed)
        self._entries = list(range(2 * len(self._places)))
        self._listed: int | None = None  # the order that the list above is in
        self._order = self._position = self._tried = self._polls = 0

    def _list_places(self) -> None:
        self._places = [(p, i) for p in self._params for i in range(p.numel())]

    def __getstate__(self) -> dict:
        """For ``copy.deepcopy((model, optimizer))`` and pickle; hooks stay behind, as in torch."""
        return {
            name: value
            for name, value in vars(self).items()
            if name != "_places" and not name.startswith("_optimizer_")
        }

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._list_places()  # of the copied parameters

    @torch.no_grad()
    def step(self, closure: Callable) -> Tensor:
        """Poll until one trial point is accepted or all have failed; the best loss so far."""
        if self.best_loss is None or not self.carry_loss:
            loss = float(self._evaluate(closure))
            if loss != self.best_loss:
                self._tried = 0
            self.best_loss = loss
        if self.best_loss == 0.0 and self.carry_loss:
            return torch.tensor(0.0)
        for entry in self._poll():
            self.evaluations += 1
            if self._try(closure, entry):
                break
        else:
            self.radius *= 0.5
            self._order += 1
            self._position = 0
        self._tried = 0
        self._polls += 1
        return torch.tensor(self.best_loss, dtype=torch.float64)

    def _poll(self):
        """The entries still to be tried at this incumbent."""
        if self.reshuffle:
            self._random.shuffle(self._entries)
            yield from self._entries
            return
        total = len(self._entries)
        if self._listed != self._order:
            self._listed = self._order
            self._entries = poll_order(self.seed, self._order, 0, total, total).tolist()
        while self._tried < total:
            yield self._entries[self._position]
            self._position = (self._position + 1) % total
            self._tried += 1

    def _try(self, closure: Callable, entry: int) -> bool:
        parameter, element = self._places[entry >> 1]
        cell = parameter.view(-1)[element]
        delta = -self.radius if entry & 1 else self.radius
        saved = cell.clone()
        cell += delta
        try:
            loss = float(self._evaluate(closure))
        except BaseException:
            cell.copy_(saved)
            raise
        if loss < self.best_loss:
            self.best_loss = loss
            self._position = (self._position + 1) % len(self._entries)
            return True
        if self.subtract_to_restore:
            cell -= delta
        else:
            cell.copy_(saved)
        return False

    def _evaluate(self, closure: Callable) -> Tensor:
        if self.fresh_masks:
            return closure()
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(self.seed, self._polls))
            return closure()

    def state_dict(self) -> dict:
        """The param groups; without ``stateless`` also what the search needs to go on.

        With ``reshuffle`` the order of what comes next is drawn anew.
        """
        state = super().state_dict()
        if not self.stateless:
            names = (
                "radius",
                "best_loss",
                "evaluations",
                "_order",
                "_position",
                "_tried",
                "_polls",
            )
            state["search"] = {name: getattr(self, name) for name in names}
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Take up a state; raises NotImplementedError if ``stateless``, as the original does."""
        if self.stateless:
            raise NotImplementedError("the reference cannot load a state; pass stateless=False")
        super().load_state_dict(state_dict)
        for name, value in state_dict["search"].items():
            setattr(self, name, value)
