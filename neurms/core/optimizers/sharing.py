"""Which rank owns which matrix of an optimizer, and what the others keep of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from neurms.core.ground.assignment import Load, assigned
from neurms.core.ground.errors import UnsupportedTrainingError
from neurms.core.ground.parcels import Crew, cut_of
from neurms.core.ground.ranks import ranks_of, world_size
from neurms.core.ground.shards import is_sharded, mesh_of
from neurms.core.optimizers.gradients import nonfinite_names
from neurms.core.optimizers.mover import Mover
from neurms.core.optimizers.plan import meta_like, tensor_bytes
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.settings import Distribute
from neurms.core.optimizers.view import View
from neurms.core.routing import Route

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["HasShares", "Sharing", "refuse_division"]

State = dict[str, Any]


class HasShares(Protocol):
    """What is shared: an optimizer."""

    state: Any

    def work(self) -> Iterable[View]:
        """Return the views of all parameters."""

    def mover_of(self, rule: str) -> Mover:
        """Return what moves the parameters that a rule takes."""

    def recipe_of(self, group: Mapping[str, Any]) -> Recipe:
        """Return the recipe of a parameter group under a rule."""

    def expected_state(
        self, like: Tensor, parameter: Tensor, group: dict[str, Any], saved: Mapping[str, Any]
    ) -> State:
        """Return the keys and shapes of a parameter's whole state."""


class Sharing:
    """The owners of an optimizer's matrices, the same on every rank.

    An owner stays one for as long as its parameter is there; parameters that come later are divided
    by what each rank has by then.

    Args:
        form: The setting ``distribute``.
        process_group: The ranks that hold replicas; None finds them.
    """

    def __init__(self, form: Distribute, process_group: Any = None) -> None:
        self.form = form
        self._process_group = process_group
        self._owners: dict[Tensor, int] = {}
        self._begin()

    def _begin(self) -> None:
        self._crews: dict[Any, Crew] = {}
        self._loads: dict[Any, list[Load]] = {}
        self._looked_at: tuple[Any, list[bool]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold; process groups cannot go along."""
        return {"form": self.form, "_owners": self._owners, "_process_group": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    @property
    def by_rows(self) -> bool:
        """Whether ranks may work on the rows of a sharded matrix that they hold."""
        return self.form in ("auto", "rows")

    # ---------------------------------------------------------------- who owns what

    @property
    def divides(self) -> bool:
        """Whether any matrix has an owner."""
        return bool(self._crews)

    def crew_of(self, parameter: Tensor) -> Crew | None:
        """Return the ranks among which a parameter's owner was chosen, None if it has none."""
        return self._crews.get(_key(parameter)) if parameter in self._owners else None

    def owner_of(self, parameter: Tensor) -> int:
        """Return the owner of a parameter that has one, by its place among its ranks."""
        return self._owners[parameter]

    def is_elsewhere(self, parameter: Tensor) -> bool:
        """Return whether another rank owns a parameter."""
        crew = self.crew_of(parameter)
        return crew is not None and self._owners[parameter] != crew.rank

    def beyond(self) -> int:
        """Return how many bytes of state the fullest owner keeps more than this rank does."""
        return sum(
            int(max(load.size for load in held) - held[self._crews[key].rank].size)
            for key, held in self._loads.items()
        )

    def assign(self, optimizer: HasShares, *, strict: bool = False) -> None:
        """Choose owners of the matrices that can be divided and have none yet.

        Args:
            optimizer: Whose matrices they are.
            strict: Whether to raise where ``distribute="owner"`` finds nobody to divide with.

        Raises:
            UnsupportedTrainingError: Several ranks run, and nothing says which hold replicas.
        """
        if self.form in ("rows", "replicate") or world_size() == 1:
            return
        work = optimizer.work()
        trained = [view.parameter.requires_grad for view in work]
        if self._looked_at is not None and self._looked_at == (work, trained):
            return
        new: dict[Any, list[View]] = {}
        for view in work:
            if self.crew_of(view.parameter) is None and self._divides(optimizer, view):
                new.setdefault(_key(view.parameter), []).append(view)
        self._looked_at = (work, trained)
        for key, views in new.items():
            crew = self._crews.get(key) or self._crew(views, strict)
            if crew is None:
                # A wrapper may come later.
                self._looked_at = None
            if crew is not None and crew.size > 1:
                self._crews[key] = crew
                # A copy of an optimizer knows the owners, and of crews nothing.
                self._choose(optimizer, key, [v for v in views if v.parameter not in self._owners])

    def _divides(self, optimizer: HasShares, view: View) -> bool:
        """Whether a matrix is one that has an owner."""
        parameter = view.parameter
        if not parameter.requires_grad or view.empty or not optimizer.mover_of(view.rule).divided:
            return False
        if self.form == "owner":
            return not view.sharded or cut_of(parameter) is not None
        # Replicas have each gradient already, and repeat what they would else have to send.
        whole = not optimizer.recipe_of(view.group).row_local
        return view.sharded and whole and cut_of(parameter) is not None

    def _crew(self, views: Sequence[View], strict: bool) -> Crew | None:
        parameters = [view.parameter for view in views]
        if views[0].sharded:
            return Crew.of_mesh(mesh_of(parameters[0]))
        if self._process_group is not None:
            return Crew.of_group(self._process_group)
        found = ranks_of(parameters)
        if found is not None:
            return Crew.of_group(found.groups[0])
        if strict:
            raise UnsupportedTrainingError(
                f'distribute="owner" among {world_size()} ranks, and neither '
                "DistributedDataParallel nor fully_shard holds these parameters; wrap the model, "
                "or pass process_group=torch.distributed.group.WORLD"
            )
        return None

    def _choose(self, optimizer: HasShares, key: Any, views: Sequence[View]) -> None:
        crew, loads = self._crews[key], [_load(optimizer, view) for view in views]
        held = self._loads.get(key) or self._held(optimizer, key, crew)
        for view, load, owner in zip(views, loads, assigned(loads, crew.size, held), strict=True):
            before = held[owner]
            held[owner] = Load(before.work + load.work, before.size + load.size)
            self._owners[view.parameter] = owner
            # What a checkpoint brought before owners were known.
            state = optimizer.state.get(view.parameter)
            for name in set(state or ()) - set(self.kept(view.parameter, state or {})):
                del state[name]
        self._loads[key] = held

    def _held(self, optimizer: HasShares, key: Any, crew: Crew) -> list[Load]:
        """Return what each rank owns, which a copy of an optimizer does not know."""
        held = [Load(0.0, 0.0)] * crew.size
        for view in optimizer.work():
            if view.parameter in self._owners and _key(view.parameter) == key:
                owner, load = self._owners[view.parameter], _load(optimizer, view)
                held[owner] = Load(held[owner].work + load.work, held[owner].size + load.size)
        return held

    def check(self, routes: Iterable[Route], recipe: Recipe, mover: Mover) -> None:
        """Raise unless several ranks can divide matrices as they are to.

        Args:
            routes: Parameters of a group.
            recipe: What moves them.
            mover: Who does.

        Raises:
            UnsupportedTrainingError: The rule needs whole matrices, or theirs are no even parts,
                or matrices move before a step.
        """
        if self.form in ("owner", "replicate") and not mover.divided and world_size() > 1:
            raise UnsupportedTrainingError(
                f'distribute={self.form!r} takes whole gradients, which update="backward" never '
                'forms; use update="step", or distribute="auto"'
            )
        for route in routes:
            if not is_sharded(route.parameter) or route.is_fallback:
                continue
            if self.form == "rows" and not recipe.row_local:
                raise UnsupportedTrainingError(
                    f'distribute="rows": {route.rule!r} needs the whole of {route.name!r}, of '
                    'which a rank holds a part; use "owner", "replicate" or "auto"'
                )
            if self.form == "owner" and cut_of(route.parameter) is None:
                raise UnsupportedTrainingError(
                    f'distribute="owner": {route.name!r} is not cut along one axis of its mesh; '
                    'use "replicate" or "auto", which gather it'
                )

    def reason(self, parameter: Tensor, recipe: Recipe | None) -> str:
        """Return what the plan says about the ranks of a matrix, empty on one process."""
        crew = self.crew_of(parameter)
        if crew is not None:
            return f"; rank {self._owners[parameter]} of {crew.size} owns it"
        if recipe is None or not is_sharded(parameter) or world_size() == 1:
            return ""
        if recipe.row_local:
            return "; each rank moves its rows"
        return f"; all {mesh_of(parameter).size()} ranks gather it"

    # ---------------------------------------------------------------- state

    def kept(self, parameter: Tensor, state: Mapping[str, Any]) -> State:
        """Return what this rank keeps of a parameter's state: numbers, and what is by rows."""
        if not self.is_elsewhere(parameter):
            return dict(state)
        return {k: v for k, v in state.items() if not isinstance(v, Tensor) or is_sharded(v)}

    def spread(self, optimizer: HasShares, states: dict[Any, State]) -> dict[Any, State]:
        """Return a state dict's states with those of owners in even parts on all ranks.

        Every rank must call this. What an owner keeps becomes a ``DTensor``, ``Shard(0)``, which
        torch's checkpoints save, gather and load for any number of ranks; numbers stay numbers.

        Args:
            optimizer: Whose states they are.
            states: Parameter's place among all -> this rank's state.
        """
        spread = dict(states)
        if not self.divides:
            return spread
        # Slow to load, and needed where there are several ranks.
        from torch.distributed.device_mesh import DeviceMesh

        meshes: dict[Crew, Any] = {}
        for view in optimizer.work():
            crew, state = self.crew_of(view.parameter), states.get(view.index)
            if crew is None or not state:
                continue
            if crew not in meshes:
                meshes[crew] = DeviceMesh.from_group(crew.group, view.device.type)
            whole = optimizer.expected_state(
                meta_like(view.parameter), view.parameter, view.group, state
            )
            owner = self._owners[view.parameter]
            spread[view.index] = {
                key: _spread(form, state.get(key), meshes[crew], owner)
                if isinstance(form, Tensor) and not is_sharded(form)
                else state[key]
                for key, form in whole.items()
            }
        return spread

    # ---------------------------------------------------------------- a step

    def met(self, optimizer: HasShares, views: Sequence[View]) -> list[View]:
        """Return what all replicas move in this step, which owners decide.

        A rank looks at the gradients of its own matrices, and one all-reduce tells the others what
        it has found: of a matrix that another rank owns a stand-in is looked at, NaN if it is bad.
        So all take the step or none, and nobody waits for a gradient that is missing.

        Args:
            optimizer: The optimizer.
            views: Parameters with their gradients, as far as this rank has them.
        """
        met = list(views)
        for crew in set(self._crews.values()):
            if crew.axes or crew.size == 1:
                # Parts of sharded gradients are there on all ranks, which agree on them elsewhere.
                continue
            owned = [view for view in optimizer.work() if self.crew_of(view.parameter) is crew]
            met = self._agreed(optimizer, crew, owned, met)
        return met

    def _agreed(
        self, optimizer: HasShares, crew: Crew, owned: Sequence[View], views: Sequence[View]
    ) -> list[View]:
        known = {id(view) for view in owned}
        mine = [v for v in views if id(v) in known and not self.is_elsewhere(v.parameter)]
        for rule in {view.rule for view in mine}:
            optimizer.mover_of(rule).prepare([view for view in mine if view.rule == rule])
        bad = set(nonfinite_names(mine))
        there = {id(view) for view in mine}
        marks = [(id(view) in there) + (view.route.name in bad) for view in owned]
        flags = torch.tensor(marks, dtype=torch.int32, device=owned[0].device)
        torch.distributed.all_reduce(flags, group=crew.group)
        met = [view for view in views if id(view) not in known]
        for view, mark in zip(owned, flags.tolist(), strict=True):
            if not mark:
                continue
            if self.is_elsewhere(view.parameter):
                value = float("nan") if mark > 1 else 0.0
                view.gradient = torch.full((1,), value, dtype=view.kept, device=view.device)
                view.state = optimizer.state.get(view.parameter, {})
            met.append(view)
        return sorted(met, key=lambda view: view.index)


def refuse_division(rule: str, form: Distribute) -> None:
    """Raise where ranks are to divide a rule whose factors all of them know.

    Raises:
        UnsupportedTrainingError: Several ranks run, and ``form`` is owner or replicate.
    """
    if form in ("owner", "replicate") and world_size() > 1:
        raise UnsupportedTrainingError(
            f"distribute={form!r} means nothing to {rule!r}: its statistics are summed over ranks, "
            'and each moves what it holds; use "auto"'
        )


def _key(parameter: Tensor) -> Any:
    """Return what parameters have in common that are divided among the same ranks."""
    return mesh_of(parameter) if is_sharded(parameter) else None


def _load(optimizer: HasShares, view: View) -> Load:
    form = optimizer.expected_state(meta_like(view.parameter), view.parameter, view.group, {})
    own = {key: value for key, value in form.items() if not is_sharded(value)}
    return Load.of(*view.route.layout.matrix_shape, tensor_bytes(own))


def _spread(form: Tensor, value: Tensor | None, mesh: DeviceMesh, owner: int) -> Tensor:
    """Return a tensor of an owner in even parts, or the same number on every rank."""
    from torch.distributed.tensor import Shard, distribute_tensor

    if value is None:
        # Of the right shape, and one number in memory.
        value = torch.zeros((), dtype=form.dtype, device=mesh.device_type).expand(form.shape)
    if form.ndim == 0:
        number = value.clone()
        torch.distributed.broadcast(number, group=mesh.get_group(), group_src=owner)
        return number
    return distribute_tensor(value.detach(), mesh, [Shard(0)], src_data_rank=owner)
