"""The knapsack of nybble.plan against brute force."""

import itertools
import math
import random

import pytest

from nybble.passes.choose.solve import Option, best, exact, least_cost, priced, total


def instance(draw, whole, layers=8, options=4):
    """Random layers: more cost, mostly less harm, as formats have it."""
    found = []
    for _ in range(draw.randint(1, layers)):
        scale = draw.lognormvariate(0, 1)
        own = []
        for _ in range(draw.randint(1, options)):
            cost = draw.randint(1, 60) if whole else draw.uniform(0.1, 10)
            own.append(Option(cost, scale * draw.lognormvariate(0, 0.7) / cost))
        found.append(own)
    low = least_cost(found)
    high = sum(max(option.cost for option in own) for own in found)
    budget = low + draw.random() * (high - low)
    return found, math.floor(budget) if whole else budget


def brute_force(layers, budget, count=1):
    choices = itertools.product(*(range(len(own)) for own in layers))
    within = [choice for choice in choices if total(layers, choice).cost <= budget]
    return sorted(within, key=lambda choice: total(layers, choice).harm)[:count]


def many(whole, count):
    draw = random.Random(0)  # noqa: S311 - an order, not a secret
    return (instance(draw, whole) for _ in range(count))


def test_the_table_is_exact_on_whole_costs():
    for layers, budget in many(whole=True, count=1000):
        if sum(len(own) for own in layers) > 24:  # brute force takes long there: fewer of those
            layers = layers[:6]
            budget = max(budget, math.ceil(least_cost(layers)))
        (want,) = brute_force(layers, budget)
        (got,) = exact(layers, budget)
        assert total(layers, got).harm == pytest.approx(total(layers, want).harm, rel=1e-12)
        assert total(layers, got).cost <= budget


def test_any_costs_are_within_a_percent_and_the_budget():
    excess = []
    for layers, budget in many(whole=False, count=300):
        layers = layers[:6]
        budget = max(budget, least_cost(layers))
        (want,) = brute_force(layers, budget)
        least = total(layers, want).harm
        for got in (exact(layers, budget)[0], priced(layers, budget), best(layers, budget)[0]):
            assert total(layers, got).cost <= budget
            excess.append(total(layers, got).harm / least - 1)
    tables, prices, both = excess[::3], excess[1::3], excess[2::3]
    assert min(excess) > -1e-12
    assert max(tables) <= 0.01
    assert sum(prices) / len(prices) <= 0.001
    assert sorted(prices)[int(0.99 * len(prices))] <= 0.01
    assert max(both) <= 0.001


def test_the_best_few_are_those_of_brute_force():
    for layers, budget in many(whole=True, count=200):
        layers = layers[:5]
        budget = max(budget, math.ceil(least_cost(layers)))
        want = [total(layers, choice).harm for choice in brute_force(layers, budget, 5)]
        got = best(layers, budget, 5)
        assert len(set(got)) == len(got)
        assert [total(layers, choice).harm for choice in got] == pytest.approx(want, rel=1e-12)


def test_harm_falls_as_the_budget_grows():
    for layers, _ in many(whole=False, count=50):
        low, high = least_cost(layers), sum(max(option.cost for option in own) for own in layers)
        budgets = [low + share * (high - low) for share in (0, 0.1, 0.25, 0.5, 0.75, 1.001)]
        harms = [total(layers, best(layers, budget)[0]).harm for budget in budgets]
        assert harms == sorted(harms, reverse=True)
        assert harms[-1] == pytest.approx(sum(min(option.harm for option in own) for own in layers))


def test_no_choice_within_the_budget_says_what_the_cheapest_costs():
    layers = [[Option(3, 1), Option(5, 0)], [Option(4, 1)]]
    for solve in (best, exact, priced):
        with pytest.raises(ValueError, match="budget=6: no choice is within it; the cheapest costs 7"):
            solve(layers, 6)
    assert best(layers, 7) == [(0, 0)]
    assert best(layers, 9) == [(1, 0)]


@pytest.mark.parametrize("option", [Option(-1, 0), Option(math.nan, 0), Option(1, math.inf)])
def test_options_that_are_no_numbers_are_refused(option):
    with pytest.raises(ValueError, match="finite harm and finite cost"):
        best([[Option(1, 1), option]], 5)
