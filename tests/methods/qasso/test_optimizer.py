"""QASSO end to end on a toy: exact K on the right rows, bits in bounds at every step, exact resume. No fault of the
published reference may pass here."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from transformers import SchedulerType, get_scheduler

from geta_hf.config import GETAConfig
from geta_hf.errors import GETAError
from geta_hf.quantization import attach_quantizers
from tests.methods.qasso.toy import (
    STEPS,
    Toy,
    adamw,
    batch_at,
    bits_of,
    make,
    small_config,
    status_of,
    toy_space,
    train_step,
    wrap,
)

PAPER = {"eta": 0.9, "xi": 0.9}
RULES = {
    "default": lambda **kw: small_config(**kw),
    "paper": lambda **kw: GETAConfig.paper(warmup=5, projection=8, joint=31, **PAPER, **kw),
}
BASES = {
    "adamw": adamw,
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, weight_decay=0.01),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=1e-2),
}


def run(config: GETAConfig, base=adamw, steps: int = STEPS, watch=lambda *_: None, activation=torch.relu):
    model, optimizer = make(config, base, activation)
    for step in range(steps):
        train_step(model, optimizer, step)
        watch(step, model, optimizer)
    return model, optimizer


def zero_masks(model) -> list[list[bool]]:
    """Which groups are zero, from the weights alone."""
    tensors = model.state_dict()
    return [
        [
            all(bool((tensors[m.tensor].index_select(m.dim, m.index[g]) == 0).all()) for m in family.members)
            for g in range(family.size)
        ]
        for family in toy_space().families
    ]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rules", RULES)
def test_exactly_k_groups_are_zero_and_no_other_row(rules: str, base: str) -> None:
    model, optimizer = run(RULES[rules](target_sparsity=0.5), BASES[base])
    zero = zero_masks(model)
    assert sum(map(sum, zero)) == 5 == optimizer.target_groups == optimizer.removed_groups
    assert [mask.tolist() for mask in optimizer.removed.values()] == zero
    dead_rows = (model.layers[0].weight == 0).all(1).sum().item() + (model.layers[2].weight == 0).all(1).sum().item()
    assert dead_rows == 3 * sum(zero[0]) + sum(zero[1])  # no row outside a group went with it


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.8])
def test_k_is_exact_at_every_period(rules: str, sparsity: float) -> None:
    seen = {}

    def watch(step, model, optimizer) -> None:
        seen[step] = (optimizer.removed_groups, optimizer.schedule.at(step))

    _, optimizer = run(RULES[rules](target_sparsity=sparsity), watch=watch)
    for removed, phase in seen.values():
        if phase.stage == "joint" and phase.ends:
            assert removed == optimizer.target_groups * (phase.period + 1) // 5
    assert seen[STEPS - 1][0] == round(10 * sparsity)


@pytest.mark.parametrize("rules", RULES)
def test_bits_stay_in_bounds_at_every_step_and_fall_b_times(rules: str) -> None:
    uppers = []

    def watch(step, model, optimizer) -> None:
        phase = optimizer.schedule.at(step)
        upper = {"warm-up": 16, "projection": 16 - 2 * (phase.period + 1)}.get(phase.stage, 8)
        if phase.stage == "projection" and phase.starts:
            uppers.append(max(bits_of(model)))
        assert all(4 - 1e-3 <= bits <= upper + 1e-3 for bits in bits_of(model)), (step, bits_of(model))

    model, _ = run(RULES[rules](), watch=watch)
    assert uppers == pytest.approx([14, 12, 10, 8], abs=0.2)  # b_u falls B times, not B - 1
    assert all(bits == pytest.approx(round(bits), abs=1e-4) for bits in bits_of(model))


def test_each_layer_is_projected_inside_its_own_bounds() -> None:
    """One d for all layers of a group, as in the published reference, would leave layers out of range."""
    model, optimizer = make(small_config(warmup=0, projection=8))
    model.layers[0].weight_quantizer.q_m.data.mul_(50)
    train_step(model, optimizer, 0)
    sizes = [layer.weight_quantizer.d.item() for layer in model.layers]
    assert bits_of(model) == pytest.approx([14.0] * 4, abs=1e-3) and sizes[0] > 20 * max(sizes[1:])


@pytest.mark.parametrize("activation", [torch.relu, torch.sigmoid])
@pytest.mark.parametrize("base", ["adamw", "sgd"])
@pytest.mark.parametrize("rules", RULES)
def test_removed_groups_stay_zero_against_momentum_and_weight_decay(rules: str, base: str, activation) -> None:
    """Under sigmoid also against their own gradient, which is there in the joint stage and in cool-down."""
    earlier: list = [set()]
    with_gradient = set()

    def watch(step, model, optimizer) -> None:
        now = {(i, j) for i, row in enumerate(zero_masks(model)) for j, dead in enumerate(row) if dead}
        removed = {(i, j) for i, m in enumerate(optimizer.removed.values()) for j in m.nonzero().flatten().tolist()}
        assert removed <= now and earlier[0] <= removed
        for i, j in earlier[0]:
            member = toy_space().families[i].members[2]
            grad = model.get_parameter(member.tensor).grad.index_select(member.dim, member.index[j])
            if bool((grad != 0).any()):
                with_gradient.add(optimizer.schedule.at(step).stage)
        earlier[0] = removed

    run(RULES[rules](target_sparsity=0.6), BASES[base], watch=watch, activation=activation)
    assert with_gradient == ({"joint", "cool-down"} if activation is torch.sigmoid else set())


def test_base_state_of_removed_groups_is_zero() -> None:
    model, optimizer = run(small_config(target_sparsity=None, target_parameters=0.5))
    weight = model.layers[0].weight
    rows = (weight == 0).all(1)
    assert rows.any() and (optimizer.state[weight]["exp_avg"][rows] == 0).all()


class Coded(torch.Tensor):
    """A moment in 4 or 8 bits as torchao keeps it: it says that it is float, and knows few operations."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        assert func.__name__ in ("__get__", "is_floating_point"), f"{func.__name__} is asked of a coded moment"
        return super().__torch_function__(func, types, args, kwargs)


class EightBit(torch.optim.AdamW):
    """AdamW with two more moments in 8 bits, of which one holds codes as bitsandbytes does: code 127 means 0, code 0
    about -1."""

    def step(self, closure=None):
        loss = super().step(closure)
        for parameter, state in self.state.items():
            state.setdefault("codes", torch.full_like(parameter, 127, dtype=torch.uint8))
            state.setdefault("coded", torch.zeros_like(parameter).as_subclass(Coded))
        return loss


def test_moments_in_eight_bits_keep_their_codes() -> None:
    """A code of 0 stands for a value; that of rmsprop_bnb_8bit is negative, which made the next step NaN."""
    model, optimizer = run(small_config(), lambda groups: EightBit(groups, lr=1e-2))
    assert optimizer.removed_groups == 5
    assert all((optimizer.state[p]["codes"] == 127).all() for p in model.layers.parameters() if p.requires_grad)


def test_cool_down_freezes_the_quantizers_and_trains_the_rest() -> None:
    seen = []

    def watch(step, model, optimizer) -> None:
        if optimizer.schedule.at(step + 1).stage == "cool-down":
            values = {name: value.clone() for name, value in model.state_dict().items()}
            seen.append(values)

    run(small_config(), watch=watch)
    first, last = seen[0], seen[-1]
    assert all(torch.equal(first[name], last[name]) for name in first if "quantizer" in name)
    assert not torch.equal(first["layers.0.weight"], last["layers.0.weight"])


def test_uniform_forgetting_shrinks_smoothly_to_the_periods_end() -> None:
    norms, config = [], small_config(pruning_periods=1, joint=20)

    def watch(step, model, optimizer) -> None:
        phase = optimizer.schedule.at(step)
        if phase.stage == "joint":
            mask = torch.zeros(12, dtype=torch.bool)
            mask[toy_space().families[0].members[0].index[status_of(optimizer)[0] > 0].flatten()] = True
            norms.append(model.layers[0].weight[mask].norm().item())

    run(config, lambda groups: torch.optim.SGD(groups, lr=0.0), watch=watch)  # forgetting alone moves the weights
    start = norms[0] * 20 / 19
    assert norms == pytest.approx([start * (19 - i) / 20 for i in range(20)], abs=0.03 * start) and norms[-1] == 0


def test_gamma_is_not_silently_zero_on_weights_of_both_signs() -> None:
    """The published reference compares a signed mean with ε, so weights that average to 0 are never forgotten."""
    seen = []
    config = GETAConfig.paper(warmup=5, projection=8, joint=31, pruning_periods=1, **PAPER)

    def watch(step, model, optimizer) -> None:
        if optimizer.schedule.at(step).stage == "joint":
            seen.append(optimizer.mean_gamma())

    run(config, watch=watch)
    assert sum(gamma > 0 for gamma in seen) > len(seen) / 2


def test_warm_up_is_the_base_optimizer_on_the_weights() -> None:
    """Standard moments: with the quantizers' learning rate at 0, QASSO's weights equal plain AdamW's bit for bit."""
    model, optimizer = make(small_config(warmup=10))
    optimizer.param_groups[1]["lr"] = 0.0
    twin = copy.deepcopy(model)
    plain = adamw([{"params": [p for n, p in twin.named_parameters() if "quantizer" not in n]}])
    for step in range(5):
        train_step(model, optimizer, step)
        train_step(twin, plain, step)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_quantizer_steps_are_relative_to_their_scale() -> None:
    """One learning rate for d of 1e-5 and of 1e-1: no step changes a quantizer by more than about its learning rate."""
    model, optimizer = make(small_config(warmup=40, projection=8, joint=5))
    ratios = []
    for step in range(20):
        before = [layer.weight_quantizer.d.item() for layer in model.layers]
        train_step(model, optimizer, step)
        ratios += [layer.weight_quantizer.d.item() / d for layer, d in zip(model.layers, before, strict=True)]
    assert all(0.98 < ratio < 1.02 for ratio in ratios) and any(ratio != 1 for ratio in ratios)
    assert all(value.item() > 0 for name, value in model.named_parameters() if "quantizer" in name)


@pytest.mark.parametrize("base", ["SGD", "AdamW", "RMSprop"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_every_step_of_a_clipping_value_is_that_of_its_logarithm(base: str, weights: torch.dtype) -> None:
    """From 1e-6 to 1e8, twenty steps against the base optimizer on log q_m in float64."""
    for magnitude in (1e-6, 1.0, 2e4, 4e4, 1e8):
        model, optimizer = make(small_config(warmup=40, projection=8, joint=5))
        model.to(weights)
        optimizer = wrap(model, small_config(warmup=40, projection=8, joint=5), _base(base))
        quantizer = model.layers[0].weight_quantizer
        assert quantizer.q_m.dtype == torch.float32
        quantizer.q_m.data.fill_(magnitude)
        log = torch.tensor([math.log(quantizer.q_m.item())], dtype=torch.float64, requires_grad=True)
        oracle = getattr(torch.optim, base)([log], lr=3e-3, weight_decay=0.0)
        for step in range(20):
            slope = math.sin(step) + 0.3
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            quantizer.q_m.grad = torch.tensor([slope / quantizer.q_m.item()])
            log.grad = torch.tensor([slope], dtype=torch.float64)
            optimizer.step()
            oracle.step()
        assert quantizer.q_m.item() == pytest.approx(math.exp(log.item()), rel=3e-6)
        assert abs(log.item() - math.log(magnitude)) > 1e-3


def _base(kind: str):
    return lambda groups: getattr(torch.optim, kind)(groups, lr=1e-2)


def test_a_base_step_that_fails_leaves_the_quantizers_as_they_were() -> None:
    model, optimizer = make(small_config())
    train_step(model, optimizer, 0)
    before = {name: p.clone() for name, p in model.named_parameters() if "quantizer" in name}

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    optimizer.base.step = fail
    with pytest.raises(KeyboardInterrupt):
        train_step(model, optimizer, 1)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("stop", [3, 9, 17, 27, 44, 52])
def test_resume_is_bit_exact_from_the_middle_of_every_stage(rules: str, stop: int) -> None:
    config = RULES[rules]()
    whole, _ = run(config)
    model, optimizer = run(config, steps=stop)
    saved = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    fresh, resumed = make(config)
    fresh.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    for step in range(stop, STEPS):
        train_step(fresh, resumed, step)
    assert resumed.removed_groups == 5
    for name, value in whole.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name


def test_loading_its_own_state_at_once_changes_nothing() -> None:
    """Accelerate does so when it prepares an optimizer."""
    config = small_config()
    whole, _ = run(config)
    model, optimizer = make(config)
    optimizer.load_state_dict(optimizer.state_dict())
    for step in range(STEPS):
        train_step(model, optimizer, step)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


def test_replaced_parameters_are_followed_by_name() -> None:
    """Accelerate rewrites param_groups[*]["params"] alone; no private map may go stale."""
    config = small_config()
    whole, _ = run(config)
    model, optimizer = make(config)
    twin = copy.deepcopy(model)
    new = dict(twin.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [new[name] for name in group["param_names"]]
    for step in range(STEPS):
        train_step(twin, optimizer, step)
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), whole.parameters(), strict=True))


def test_a_bad_gradient_is_named_with_its_layer_and_step_by_the_next_boundary() -> None:
    model, optimizer = run(small_config(), steps=10)
    x, y = batch_at(10)
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    model.layers[1].weight_quantizer.d.grad.fill_(float("inf"))
    optimizer.step()  # no boundary, so nothing waits for the device here
    with pytest.raises(GETAError, match=r"^the gradient of layers\.1\.weight_quantizer.* at step 10\. .* earlier step"):
        for step in range(11, 14):
            train_step(model, optimizer, step)


def test_a_bad_gradient_in_cool_down_is_named_too() -> None:
    model, optimizer = run(small_config(), steps=50)
    x, y = batch_at(50)
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    model.layers[3].weight.grad[1, 2] = float("nan")
    optimizer.step()
    with pytest.raises(GETAError, match=r"^the gradient of layers\.3\.weight_quantizer .* at step 50"):
        optimizer.check_finite()


def test_one_bad_element_of_a_weights_gradient_shows_in_that_of_d() -> None:
    model, _ = make(small_config())
    layer = model.layers[1]
    out = layer(torch.randn(4, 12))
    poison = torch.zeros_like(out)
    poison[2, 5] = float("nan")
    out.backward(poison)
    assert not torch.isfinite(layer.weight_quantizer.d.grad).any()


def test_a_reduction_of_ones_own_is_for_weights_alone() -> None:
    """Also where activations have the same range: they end at its upper end, weights at b_u - B·b_r."""
    _, optimizer = make(small_config(bits=(4, 8), activation_bits=(4, 8), bit_reduction=2.5))
    optimizer.param_groups[0]["qasso_step"] = 20  # in the joint stage
    assert optimizer.bit_bounds == (4, 6) and optimizer.input_bit_bounds == (4, 8)


def test_a_closure_is_evaluated_with_gradients() -> None:
    model, optimizer = make(small_config())
    loss = optimizer.step(lambda: (model(torch.ones(2, 8)).sum().backward(), 1.5)[1])
    assert loss == 1.5 and model.layers[0].weight.grad is not None


def test_steps_that_a_scaler_skips_do_not_advance_the_schedule() -> None:
    """fp16: an overflow costs a step of training, not one of the stages, and changes nothing."""
    model, optimizer = make(small_config())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    skipped = {3, 7, 20}
    for attempt in range(STEPS):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        count = optimizer.step_count
        x, y = batch_at(attempt)
        optimizer.zero_grad()
        scaler.scale((model(x) - y).square().mean()).backward()
        if attempt in skipped:
            model.layers[0].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert same == (attempt in skipped) and optimizer.step_count == count + (attempt not in skipped)
    assert optimizer.step_count == STEPS - 3 and optimizer.finished and optimizer.removed_groups == 5


def test_a_learning_rate_scheduler_accepts_it() -> None:
    model, optimizer = make(small_config())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    train_step(model, optimizer, 0)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [5e-3, 1.5e-3]
    assert optimizer.base.param_groups is optimizer.param_groups


def test_state_of_another_space_or_schedule_is_refused() -> None:
    _, optimizer = make(small_config())
    _, other = make(small_config(joint=30))
    with pytest.raises(GETAError, match="stages"):
        other.load_state_dict(optimizer.state_dict())
    state = optimizer.state_dict()
    for values in state["state"].values():
        values.clear()
    with pytest.raises(GETAError, match="of another model"):
        optimizer.load_state_dict(state)


def test_parameters_that_are_not_trained_are_refused() -> None:
    model, _ = make(small_config())
    model.layers[0].bias.requires_grad_(False)
    with pytest.raises(GETAError, match=r"layers\.0\.bias, which is not trained"):
        wrap(model, small_config())


def test_base_optimizers_and_parameters_that_cannot_be_wrapped() -> None:
    with pytest.raises(GETAError, match="LBFGS evaluates the loss several times"):
        make(small_config(), lambda groups: torch.optim.LBFGS([p for g in groups for p in g["params"]]))
    with pytest.raises(GETAError, match="SparseAdam takes sparse gradients"):
        make(small_config(), lambda groups: torch.optim.SparseAdam([p for g in groups for p in g["params"]]))
    switched = type("AdamWScheduleFree", (torch.optim.AdamW,), {"train": lambda self: None, "eval": lambda self: None})
    with pytest.raises(GETAError, match="AdamWScheduleFree keeps an average of the weights"):
        make(small_config(), switched)
    model, optimizer = make(small_config())
    with pytest.raises(GETAError, match="is a QASSO already"):
        wrap(model, small_config(), lambda _: optimizer)

    def with_complex_numbers(groups: list) -> torch.optim.Optimizer:
        groups[0]["params"][0].data = groups[0]["params"][0].data.to(torch.complex64)
        return torch.optim.SGD(groups, lr=1e-3)

    with pytest.raises(GETAError, match=r"layers\.0\.weight is torch\.complex64; only floating-point"):
        wrap(model, small_config(), with_complex_numbers)


@pytest.mark.parametrize("stop", [13, 43])
def test_nan_in_a_quantizer_is_named_at_the_next_boundary(stop: int) -> None:
    """Step 13 starts the joint stage, step 43 ends it."""
    model, optimizer = run(small_config(), steps=stop)
    model.layers[1].weight_quantizer.q_m.data.fill_(float("nan"))
    with pytest.raises(GETAError, match=rf"^d, q_m or t of layers\.1\.weight_quantizer .* at step {stop}"):
        train_step(model, optimizer, stop)


@pytest.mark.parametrize("rules", RULES)
def test_no_host_synchronisation_between_period_boundaries(monkeypatch, rules: str) -> None:
    # SGD, since torch's single-tensor Adam reads its own step counter on the host.
    model, optimizer = make(RULES[rules](), lambda groups: torch.optim.SGD(groups, lr=1e-3, momentum=0.9))
    boundaries = {s for s in range(STEPS) if optimizer.schedule.at(s).starts or optimizer.schedule.at(s).ends}

    def forbidden(*_args, **_kwargs):
        raise AssertionError("host synchronisation")

    for step in range(STEPS):
        x = torch.ones(4, 8)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        # one step after a boundary the index lists are rebuilt
        if step in boundaries or step - 1 in boundaries:
            optimizer.step()
            continue
        with monkeypatch.context() as patch:
            for name in ("item", "__bool__", "__float__", "__int__", "tolist", "nonzero", "cpu"):
                patch.setattr(torch.Tensor, name, forbidden)
            for name in ("tensor", "as_tensor"):  # a number sent to the device waits for it too
                patch.setattr(torch, name, forbidden)
            optimizer.step()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks the GPU's own watch for synchronisation")
@pytest.mark.parametrize("rules", RULES)
def test_no_host_synchronisation_on_a_gpu(rules: str) -> None:
    torch.manual_seed(0)
    config = RULES[rules]()
    model = Toy().cuda()
    attach_quantizers(model, initial_bits=config.initial_bits, target_bits=8, learn_t=config.learn_exponent)
    optimizer = wrap(model, config, lambda groups: torch.optim.AdamW(groups, lr=1e-3, fused=True))
    boundaries = {s for s in range(STEPS) if optimizer.schedule.at(s).starts or optimizer.schedule.at(s).ends}
    x = torch.ones(4, 8, device="cuda")
    for step in range(STEPS):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        quiet = step > 1 and not {step, step - 1} & boundaries
        torch.cuda.set_sync_debug_mode("error" if quiet else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert optimizer.removed_groups == 5


def test_the_projection_stage_averages_what_the_first_partition_reads() -> None:
    """m <- λ m + (1 - λ) ⟨g, x⟩² from the first step of the projection stage on, written out for one family."""
    config = small_config()
    model, optimizer = make(config)
    inside, outside = model.layers[2], model.layers[3]
    expected = torch.zeros(len(inside.weight))
    for step in range(5 + 8):
        rows, bias, columns = (tensor.detach().clone() for tensor in (inside.weight, inside.bias, outside.weight))
        train_step(model, optimizer, step)
        if step < 5:
            assert not optimizer.mean_square.any()  # nothing in warm-up
            continue
        # The gradients that the step saw are still there.
        inner = (rows * inside.weight.grad).sum(1) + bias * inside.bias.grad
        inner += (columns * outside.weight.grad).sum(0)
        expected = config.saliency_decay * expected + (1 - config.saliency_decay) * inner.square()
    sizes = {family.name: family.size for family in optimizer.families}
    start = sum(size for name, size in list(sizes.items())[: list(sizes).index("layers:channels")])
    found = optimizer.mean_square[start : start + sizes["layers:channels"]]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


# --- what schedulers, callbacks and Accelerate read of an optimizer -------------------------------------------------


@pytest.mark.parametrize("kind", [kind.value for kind in SchedulerType])
def test_every_scheduler_of_trainer_gives_the_rates_that_the_base_optimizer_would_have(kind: str) -> None:
    options = {"cosine_with_min_lr": {"min_lr": 1e-4}, "cosine_warmup_with_min_lr": {"min_lr": 1e-4}}
    options["warmup_stable_decay"] = {"num_decay_steps": 3}
    rates = []
    for wrapped in (True, False):
        model, optimizer = make(small_config())
        optimizer = optimizer if wrapped else optimizer.base
        scheduler = get_scheduler(
            kind, optimizer, num_warmup_steps=2, num_training_steps=9, scheduler_specific_kwargs=options.get(kind)
        )
        for step in range(8):
            train_step(model, optimizer, step)
            scheduler.step(*([1.0 + step] if kind in ("reduce_lr_on_plateau", "greedy") else []))
            rates.append([group["lr"] for group in optimizer.param_groups])
    assert rates[:8] == rates[8:]
    varied = len({tuple(rate) for rate in rates[:8]}) > 1
    assert varied or kind in ("constant", "reduce_lr_on_plateau", "greedy")


def test_defaults_state_and_groups_are_those_of_the_base_also_after_loading() -> None:
    model, optimizer = make(small_config())
    train_step(model, optimizer, 0)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for name in ("defaults", "state", "param_groups"):
        assert getattr(optimizer, name) is getattr(optimizer.base, name)
    assert optimizer.defaults["lr"] == 1e-2


def test_a_group_added_in_training_is_trained_by_the_base_and_survives_a_checkpoint() -> None:
    model, optimizer = make(small_config())
    more = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(GETAError, match=r"add_param_group needs the names.*\(name, tensor\) pairs"):
        optimizer.add_param_group({"params": [more]})
    optimizer.add_param_group({"params": iter([("more", more)]), "lr": 0.5, "weight_decay": 0.0})
    train_step(model, optimizer, 0)
    more.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.param_groups[-1]["param_names"] == ["more"] and more.max() < 0.6
    assert optimizer.base.param_groups[-1]["params"][0] is more
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train_step(model, optimizer, 1)
