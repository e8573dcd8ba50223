# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A run is known again as what it was, and as nothing else."""

import weakref

import pytest
import torch

from vllm.model_executor.model_loader.reload.calls import TensorSpec
from vllm.model_executor.model_loader.reload.planned import PlannedCopies
from vllm.model_executor.model_loader.reload.route import Route
from vllm.model_executor.model_loader.reload.route_table import RouteTable
from vllm.model_executor.model_loader.reload.runs import Run

# Nothing is copied of these: a run is about what comes.
ROUTES = {name: Route(TensorSpec((2, 4), torch.float32), ()) for name in "abcd"}


def weights(names: str) -> list[tuple[str, torch.Tensor]]:
    return [(name, torch.ones(2, 4)) for name in names]


def run_of(names: str, followed_by: str = "") -> Run:
    table = RouteTable(ROUTES, {})
    numbers = [table.numbers[name] for name in names]
    return Run(table, numbers, weights(names + followed_by), 0)


@pytest.mark.parametrize("names", ["ab", "abcd", "acb", "cab", "ab?"])
def test_other_names_are_another_run(names):
    run = run_of("abc")
    assert run.is_like(weights("?abc"), 1)
    assert not run.is_like(weights("?" + names), 1)


def test_a_run_that_something_followed_is_another_without_it():
    run = run_of("ab", followed_by="?")
    assert run.is_like(weights("ab?"), 0)
    assert not run.is_like(weights("ab"), 0)
    assert not run.is_like(weights("abc"), 0)


class Subclass(torch.Tensor):
    pass


OTHER_FORMS = {
    "shape": torch.ones(4, 2),
    "dtype": torch.ones(2, 4).double(),
    "strides": torch.ones(4, 2).t(),
    "device": torch.ones(2, 4, device="meta"),
    "type": torch.ones(2, 4).as_subclass(Subclass),
    "gradient": torch.ones(2, 4, requires_grad=True),
    "sparse": torch.ones(2, 4).to_sparse(),
}


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_another_form_is_another_run(form):
    sent = weights("abc")
    assert run_of("abc").is_like(sent, 0)
    sent[1] = "b", OTHER_FORMS[form]
    assert not run_of("abc").is_like(sent, 0)


def test_no_tensor_is_kept():
    sent = weights("abc")
    tensors = [weakref.ref(tensor) for _, tensor in sent]
    run = Run(RouteTable(ROUTES, {}), [0, 1, 2], sent, 0)
    assert run.is_like(sent, 0)
    del sent
    assert [tensor() for tensor in tensors] == [None] * 3


class Counting(PlannedCopies):
    """Counts how often tensors are looked at one by one."""

    looks = 0

    def _numbers_at(self, weights, start):
        self.looks += 1
        return super()._numbers_at(weights, start)


def sync(table: RouteTable, sent: list[tuple[str, torch.Tensor]]) -> int:
    """Stage a list; how many runs were not known."""
    planned = Counting(ROUTES, [], lambda _: None, None, table)
    assert planned.take_run(sent, 0) == len(sent)
    return planned.looks


def test_a_sync_knows_the_runs_of_the_last_one():
    table = RouteTable(ROUTES, {})
    assert [sync(table, weights(n)) for n in ("abc", "abc", "abcd", "abcd")] == [
        1,
        0,
        1,
        0,
    ]


class Walked(list):
    """A list that must not be walked from its start to a place in its midst."""

    def __iter__(self):
        raise AssertionError("walked")


@pytest.mark.parametrize("names", ["??a", "??b", "????"])
def test_a_place_in_a_long_list_costs_what_the_first_does(names):
    planned = PlannedCopies(ROUTES, [], lambda _: None, None, RouteTable(ROUTES, {}))
    sent = Walked(weights(names))
    assert planned.take_run(sent, 2) == (2 if names == "????" else 3)


def test_a_run_that_was_not_sent_again_is_forgotten():
    table = RouteTable(ROUTES, {})
    sync(table, weights("ab"))
    sync(table, weights("cd"))
    assert table.runs.keys() == {"c"}


def ends_of_runs(planned: PlannedCopies, sent: list, start: int = 0) -> list[int]:
    """Where the runs of a list end, up to a tensor without a route."""
    end = planned.take_run(sent, start)
    return [end, *ends_of_runs(planned, sent, end)] if end > start else []


def test_a_new_route_leaves_the_runs_around_it_known():
    table = RouteTable({name: ROUTES[name] for name in ("a", "c", "d")}, {})
    sent = weights("abcd")
    first = Counting(ROUTES, [], lambda _: None, None, table)
    assert ends_of_runs(first, sent) == [1] and ends_of_runs(first, sent, 2) == [4]
    table.add({"b": ROUTES["b"]}, {})
    second = Counting(ROUTES, [], lambda _: None, None, table)
    assert ends_of_runs(second, sent) == [1, 2, 4]
    assert second.looks == 1


def test_lists_that_are_cut_elsewhere_each_time_leave_one_run():
    table = RouteTable(ROUTES, {})
    for cut in (3, 2, 1):
        planned = PlannedCopies(ROUTES, [], lambda _: None, None, table)
        for names in ("abcd"[:cut], "abcd"[cut:]):
            ends_of_runs(planned, weights(names))
    assert sync(table, weights("abcd")) == 1


def test_a_run_goes_past_where_another_began_that_is_not_sent():
    table = RouteTable(ROUTES, {})
    sync(table, weights("cd"))
    assert sync(table, weights("abc")) == 1


def test_another_route_of_a_name_forgets_the_runs():
    table = RouteTable(ROUTES, {})
    sync(table, weights("ab"))
    table.add({"e": ROUTES["a"]}, {})
    assert table.runs.keys() == {"a"}
    table.add({"b": ROUTES["b"]}, {})
    assert not table.runs
