"""The contract of every head.

A new head joins by a line in `CASES`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from flowomni.heads import (
    HEADS,
    CodeSampling,
    FlowSampling,
    RegressionSampling,
    SpeechHead,
    build_head,
    head_config,
)
from flowomni.tokenizers.base import TokenSpec

HIDDEN, DIM = 12, 20
LATENTS = TokenSpec("continuous", DIM, 0, 0, 24_000, 2_048, 0)
CODES = TokenSpec("discrete", 0, 4, 64, 24_000, 2_048, 0)
ONE_CODE = TokenSpec("discrete", 0, 1, 64, 24_000, 2_048, 0)


@dataclass(frozen=True)
class Case:
    """A head to hold to the contract.

    Attributes:
        lively: config under which the loss is its expectation.
        misspelt: an unknown key, and the nearest that there is.
        random_loss, random_token: whether the loss and the samples depend on the generator.
    """

    config: dict[str, Any]
    spec: TokenSpec
    wrong_spec: TokenSpec
    samplings: list[Any]
    bad_samplings: list[tuple[dict[str, Any], str]]
    lively: dict[str, Any] = field(default_factory=dict)
    misspelt: tuple[str, str] = ("widht", "width")
    random_loss: bool = False
    random_token: bool = True

    def head(self, **changes: Any) -> SpeechHead:
        torch.manual_seed(0)
        head = build_head(self.config | changes, self.spec, HIDDEN)
        with torch.no_grad():  # as after some training: zero-initialised layers would hide what they are fed
            for parameter in head.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return head

    def tokens(self, *shape: int) -> Tensor:
        if self.spec.kind == "continuous":
            return torch.randn(*shape, self.spec.dim, generator=seeded(1))
        return torch.randint(self.spec.codebook_size, (*shape, self.spec.num_codebooks), generator=seeded(1))


BAD_FLOW_SAMPLINGS = [
    ({"temperature": -0.1}, "temperature is -0.1"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"num_steps": 0}, "num_steps is 0"),
    ({"num_steps": 2.5}, "num_steps is 2.5"),
    ({"solver": "rk4"}, "solver is 'rk4'.*euler, midpoint, dopri5, map"),
    ({"guidance": -1.0}, "guidance is -1.0"),
    ({"guidance": float("inf")}, "guidance is inf"),
]
ODE_SAMPLINGS = [
    FlowSampling(num_steps=3, guidance=guidance, temperature=0.7, solver=solver)
    for solver, guidance in [("euler", 1.0), ("euler", 2.0), ("midpoint", 1.5), ("dopri5", 1.0)]
]
JUMPS = [FlowSampling(num_steps=n, solver="map", guidance=guidance) for n, guidance in [(1, 1.0), (3, 1.0), (1, 1.5)]]
FLOW = {"kind": "flow", "width": 16, "num_blocks": 2, "condition_dropout": 0.5}
MANY_DRAWS: dict[str, Any] = {
    "lively": {"num_draws": 4_000},
    "misspelt": ("num_draw", "num_draws"),
    "random_loss": True,
}
BAD_CODE_SAMPLINGS = [
    ({"temperature": -0.1}, "temperature is -0.1"),
    ({"temperature": float("inf")}, "temperature is inf"),
    ({"top_k": -1}, "top_k is -1"),
    ({"top_k": 2.0}, "top_k is 2.0"),
    ({"top_p": 0.0}, "top_p is 0.0"),
    ({"top_p": 1.5}, "top_p is 1.5"),
    ({"guidance": -1.0}, "guidance is -1.0"),
]
CODE_SAMPLINGS = [
    CodeSampling(),
    CodeSampling(temperature=1.5),
    CodeSampling(top_k=20),
    CodeSampling(top_p=0.9),
    CodeSampling(2.0, 30, 0.8),
    CodeSampling(guidance=2.0),
]
PARALLEL = {"width": 16, "num_blocks": 2, "code_dim": 8, "condition_dropout": 0.5}
NOISY = {"feedback_replace": 0.5, "feedback_drop": 0.5}
DEPTH = {"kind": "depth", "width": 16, "num_heads": 2, "code_dim": 8, "condition_dropout": 0.5}
CASES = {
    "flow-cfm": Case(FLOW, LATENTS, CODES, ODE_SAMPLINGS, BAD_FLOW_SAMPLINGS, **MANY_DRAWS),
    "flow-lsd": Case(
        FLOW | {"objective": "lsd"}, LATENTS, CODES, ODE_SAMPLINGS + JUMPS, BAD_FLOW_SAMPLINGS, **MANY_DRAWS
    ),
    "regression-l1": Case(
        {"kind": "regression", "width": 16, "num_blocks": 2},
        LATENTS,
        CODES,
        [RegressionSampling()],
        [],
        random_token=False,
    ),
    "regression-l2": Case(
        {"kind": "regression", "width": 16, "num_blocks": 1, "loss": "l2"},
        LATENTS,
        CODES,
        [RegressionSampling()],
        [],
        random_token=False,
    ),
    "single": Case(
        PARALLEL | {"kind": "single"} | NOISY, ONE_CODE, LATENTS, CODE_SAMPLINGS, BAD_CODE_SAMPLINGS, random_loss=True
    ),
    "delay": Case(PARALLEL | {"kind": "delay"}, CODES, LATENTS, CODE_SAMPLINGS, BAD_CODE_SAMPLINGS, random_loss=True),
    "depth": Case(
        DEPTH | {"level_weights": [5, 1]} | NOISY, CODES, LATENTS, CODE_SAMPLINGS, BAD_CODE_SAMPLINGS, random_loss=True
    ),
}
ROWS = torch.tensor([0, 0, 0, 2, 2, 3, 3])
N = len(ROWS)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hidden(num_rows: int) -> Tensor:
    return torch.randn(num_rows, HIDDEN, generator=seeded(2))


# --- The contract of every head ---------------------------------------------------------------------------------------


def test_every_kind_of_head_is_held_to_the_contract() -> None:
    assert {case.config["kind"] for case in CASES.values()} == set(HEADS)


def test_embed_reads_tokens_one_by_one(case: Case) -> None:
    head, tokens = case.head(), case.tokens(3, 5)
    embedded_BLH = head.embed(tokens)
    assert embedded_BLH.shape == (3, 5, HIDDEN) and bool(embedded_BLH.isfinite().all())
    torch.testing.assert_close(embedded_BLH[1, 2], head.embed(tokens[1, 2]))


def test_loss_is_a_sum_with_a_count_and_detached_parts(case: Case) -> None:
    loss = case.head().loss(hidden(N), case.tokens(N), ROWS, seeded(0))
    assert loss.sum.shape == loss.count.shape == () and loss.count == N
    assert loss.sum.dtype == torch.float32 and loss.sum.requires_grad and bool(loss.sum.isfinite())
    for total, count in loss.parts.values():
        assert total.shape == count.shape == () and not total.requires_grad and bool(total.isfinite())


def test_loss_is_a_function_of_the_generator(case: Case) -> None:
    head, tokens = case.head(), case.tokens(N)
    first, again, other = (head.loss(hidden(N), tokens, ROWS, seeded(seed)).sum for seed in (0, 0, 1))
    assert torch.equal(first, again) and torch.equal(first, other) != case.random_loss


def test_loss_without_positions_is_zero_and_still_differentiable(case: Case) -> None:
    head = case.head()
    loss = head.loss(hidden(0), case.tokens(0), ROWS[:0], seeded(0))
    assert loss.sum == 0 and loss.count == 0
    loss.sum.backward()
    assert all(p.grad is None or not p.grad.any() for p in head.parameters())


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_loss_and_samples_are_computed_in_float32(case: Case, weights: torch.dtype) -> None:
    """Under autocast, and with bfloat16 weights, as with float32 weights of the same values outside autocast."""
    head = case.head().to(weights)
    exact = case.head()
    exact.load_state_dict(head.state_dict())
    hidden_NH, tokens = hidden(N).bfloat16(), case.tokens(N)
    with torch.autocast("cpu", torch.bfloat16):
        loss = head.loss(hidden_NH, tokens, ROWS, seeded(0)).sum
        token = head.sample(hidden_NH, head.default_sampling(), seeded(0))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact.loss(hidden_NH.float(), tokens, ROWS, seeded(0)).sum)
    torch.testing.assert_close(token, exact.sample(hidden_NH.float(), head.default_sampling(), seeded(0)))


def test_gradient_reaches_hidden_and_every_parameter(case: Case) -> None:
    head, hidden_NH = case.head(), hidden(N).requires_grad_()
    loss = head.loss(hidden_NH, case.tokens(N), torch.arange(N), seeded(0)).sum
    (loss + head.embed(case.tokens(2, 3)).square().sum()).backward()
    assert hidden_NH.grad is not None and bool(hidden_NH.grad.isfinite().all()) and bool(hidden_NH.grad.any())
    trained = {name for name, p in head.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
    everything = {name for name, _ in head.named_parameters()}
    assert trained == everything, f"no gradient: {everything - trained}"
    assert all(p.grad is not None for p in head.parameters()), "a parameter outside the graph stalls DDP"


def test_loss_of_a_batch_is_the_sum_over_its_parts(case: Case) -> None:
    """With so many draws, where there are any, that the loss is its expectation."""
    head, hidden_NH, tokens = case.head(**case.lively).eval(), hidden(2), case.tokens(2)
    together = head.loss(hidden_NH, tokens, ROWS[:2], seeded(0))
    apart = [head.loss(hidden_NH[i : i + 1], tokens[i : i + 1], ROWS[:1], seeded(5 + i)) for i in range(2)]
    assert together.count == sum(part.count for part in apart)
    torch.testing.assert_close(together.sum, apart[0].sum + apart[1].sum, rtol=0.03, atol=0)


def test_sampling_is_a_function_of_the_generator(case: Case) -> None:
    head = case.head()
    for sampling in case.samplings:
        first, again, other = (head.sample(hidden(3), sampling, seeded(seed)) for seed in (0, 0, 1))
        assert first.shape == case.tokens(3).shape and first.dtype == case.tokens(3).dtype
        assert not first.requires_grad and bool(first.isfinite().all())
        assert torch.equal(first, again) and torch.equal(first, other) != case.random_token


def test_a_row_with_its_own_generator_is_that_row_alone(case: Case) -> None:
    head, hidden_BH = case.head(), hidden(3)
    for sampling in case.samplings:
        together = head.sample(hidden_BH, sampling, [seeded(i) for i in range(3)])
        for i in range(3):
            alone = head.sample(hidden_BH[i : i + 1], sampling, seeded(i))
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_number_of_generators_must_fit(case: Case) -> None:
    with pytest.raises(ValueError, match="2 generators for 3 rows"):
        case.head().sample(hidden(3), case.samplings[0], [seeded(0), seeded(1)])


def test_default_sampling_works_and_is_of_the_heads_kind(case: Case) -> None:
    head = case.head()
    assert isinstance(head.default_sampling(), head.Sampling)
    assert head.sample(hidden(2), head.default_sampling(), seeded(0)).shape == case.tokens(2).shape


def test_perturb_keeps_tokens_tokens(case: Case) -> None:
    head, tokens = case.head(), case.tokens(2, 5)
    for perturbed in head.perturb(tokens, seeded(0)):
        assert perturbed.shape == tokens.shape and perturbed.dtype == tokens.dtype


def test_a_head_on_the_wrong_tokens_names_both(case: Case) -> None:
    with pytest.raises(
        ValueError, match=f"head.kind is '{case.config['kind']}'.*spec.kind is '{case.wrong_spec.kind}'"
    ):
        build_head(case.config, case.wrong_spec, HIDDEN)


def test_bad_sampling_values_are_named(case: Case) -> None:
    for values, message in case.bad_samplings:
        with pytest.raises(ValueError, match=message):
            HEADS[case.config["kind"]].Sampling(**values)


def test_save_and_load(case: Case) -> None:
    head, copy = case.head(), build_head(case.config, case.spec, HIDDEN)
    copy.load_state_dict(head.state_dict())
    sampled = [h.sample(hidden(2), case.samplings[0], seeded(0)) for h in (head, copy)]
    assert torch.equal(*sampled)


def test_config_is_strict(case: Case) -> None:
    with pytest.raises(ValueError, match=r"head.kind is 'flux'.*flow"):
        head_config({"kind": "flux"})
    wrong, right = case.misspelt
    with pytest.raises(ValueError, match=rf"head.{wrong}: unknown key; did you mean '{right}'\?"):
        head_config(case.config | {wrong: 4})
