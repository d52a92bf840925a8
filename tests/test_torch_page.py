"""The code of docs/torch.md against policy_loss; scripts/torch_page.sh brings PyTorch."""

import itertools
import sys
import types
from typing import Any

import jax
import numpy as np
import pytest

from gipo_jax.config import KERNELS, LOSS_AGG_MODES
from gipo_jax.policy_loss import ROLLOUT_LEVELS, ROLLOUT_MODES, policy_loss
from tests.project.test_guide import BLOCK, DOCS

torch = pytest.importorskip("torch")

SIZE = (4, 6)


def defined(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    """A file of the page as a module, by its name."""
    blocks = BLOCK.findall((DOCS / "torch.md").read_text(encoding="utf-8"))
    (text,) = (text for _, file, text in blocks if file == f"{name}.py")
    module = types.ModuleType(name)
    exec(compile(text, f"{name}.py", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Any:
    return defined(monkeypatch, "gipo_torch")


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    """Responses in float64, one with a hole, one without a token, and NaN at padding."""
    generator = np.random.default_rng(0)
    mask = np.arange(SIZE[1]) < np.array([6, 3, 0, 4])[:, None]
    mask[0, 2] = False
    old = np.log(generator.uniform(0.1, 0.9, SIZE))
    return {
        "log_prob": np.where(mask, old + generator.normal(scale=0.7, size=SIZE), np.nan),
        "old_log_prob": old,
        "advantages": generator.normal(size=SIZE) * (generator.uniform(size=SIZE) > 0.1),
        "response_mask": mask,
        "rollout_log_prob": np.where(mask, old + generator.normal(scale=0.5, size=SIZE), np.nan),
    }


def of_torch(page: Any, arrays: dict[str, Any], rollout: Any = None, **given: Any) -> Any:
    """Loss and gradient of the page's code."""
    x = {name: torch.tensor(array) for name, array in arrays.items()}
    log_prob = x["log_prob"].requires_grad_()
    if rollout is not None:
        given["weight"] = page.rollout_weight(
            x["old_log_prob"], x["rollout_log_prob"], x["response_mask"], *rollout
        )
    order = ("old_log_prob", "advantages", "response_mask")
    loss = page.gipo_loss(log_prob, *(x[name] for name in order), **given)
    loss.backward()
    return loss.item(), log_prob.grad.numpy()


def of_ours(arrays: dict[str, Any], rollout: Any = None, **given: Any) -> Any:
    arrays = dict(arrays)
    if rollout is None:
        del arrays["rollout_log_prob"]
    else:
        names = ("rollout_level", "rollout_mode", "rollout_bounds")
        given |= dict(zip(names, rollout, strict=True))

    def loss(log_prob: Any) -> Any:
        return policy_loss(**arrays | {"log_prob": log_prob}, metrics=False, **given)[0]

    with jax.enable_x64(True):
        expected, gradient = jax.value_and_grad(loss)(arrays["log_prob"])
    return float(expected), np.asarray(gradient)


def check(page: Any, arrays: dict[str, Any], *rollout: Any, **given: Any) -> None:
    loss, gradient = of_torch(page, arrays, *rollout, **given)
    expected, slope = of_ours(arrays, *rollout, **given)
    assert expected != 0
    np.testing.assert_allclose(loss, expected, rtol=1e-6, err_msg=str((given, rollout)))
    np.testing.assert_allclose(gradient, slope, rtol=1e-6, atol=1e-9, err_msg=str((given, rollout)))


def test_the_page_has_the_loss_at_each_width_kernel_and_denominator(
    page: Any, arrays: dict[str, np.ndarray]
) -> None:
    for kernel, sigma, ratio, denominator in itertools.product(
        KERNELS, (0.2, 1.0, 3.0), (1.0, 0.5), (None, 20)
    ):
        given = {"kernel": kernel, "sigma": sigma, "sigma_neg_ratio": ratio}
        check(page, arrays, denominator=denominator, **given)


def test_the_page_has_the_loss_in_each_mode_of_aggregation(
    page: Any, arrays: dict[str, np.ndarray]
) -> None:
    for mode, denominator in itertools.product(LOSS_AGG_MODES, (None, 7)):
        check(page, arrays, loss_agg_mode=mode, denominator=denominator)
        of_rows = arrays | {"advantages": arrays["advantages"][:, 0]}
        check(page, of_rows, loss_agg_mode=mode)
    check(page, arrays, loss_agg_mode="seq-mean-token-sum-norm", max_tokens=11)
    with pytest.raises(ValueError, match="loss_agg_mode"):
        of_torch(page, arrays, loss_agg_mode="token-sum")


def test_the_page_has_each_rollout_correction(page: Any, arrays: dict[str, np.ndarray]) -> None:
    for level, mode, bounds in itertools.product(
        ROLLOUT_LEVELS, ROLLOUT_MODES, ((0.0, 2.0), (0.7, 1.3))
    ):
        check(page, arrays, (level, mode, bounds), sigma=0.5)


def test_a_batch_without_a_token_has_loss_and_gradient_of_zero(
    page: Any, arrays: dict[str, np.ndarray]
) -> None:
    nothing = arrays | {"response_mask": np.zeros(SIZE, bool)}
    loss, gradient = of_torch(page, nothing)
    assert loss == 0 and not gradient.any()


def test_the_class_for_trl_takes_the_tokens_of_the_step_and_the_weights_of_trl(
    page: Any, arrays: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = {name: np.nan_to_num(array) for name, array in arrays.items()}
    log_prob = torch.tensor(arrays["log_prob"]).requires_grad_()
    asked: dict[str, Any] = {}

    class Trainer:
        accelerator = types.SimpleNamespace(num_processes=2)

        def _get_per_token_logps_and_entropies(
            self, model: Any, ids: Any, attention: Any, kept: int
        ) -> Any:
            asked.update(model=model, ids=ids.shape, attention=attention.shape, kept=kept)
            return log_prob, None, None

    trl: Any = types.ModuleType("trl")
    trl.GRPOTrainer = Trainer
    monkeypatch.setitem(sys.modules, "trl", trl)
    trainer = defined(monkeypatch, "trl_gipo").GIPOTrainer()
    mask = torch.tensor(arrays["response_mask"])
    tool = torch.ones(SIZE, dtype=torch.int64)
    tool[1, 0] = 0
    weight = torch.tensor([[0.5], [1.5], [1.0], [0.0]], dtype=torch.float64)
    inputs = {
        "prompt_ids": torch.ones((SIZE[0], 2), dtype=torch.int64),
        "prompt_mask": torch.ones((SIZE[0], 2), dtype=torch.int64),
        "completion_ids": torch.ones(SIZE, dtype=torch.int64),
        "completion_mask": mask.long(),
        "tool_mask": tool,
        "advantages": torch.tensor(arrays["advantages"][:, 0]),
        "old_per_token_logps": torch.tensor(arrays["old_log_prob"]),
        "num_items_in_batch": torch.tensor(30),
        "importance_sampling_ratio": weight,
    }
    loss = trainer._compute_loss("model", inputs)
    assert asked == {"model": "model", "ids": (4, 8), "attention": (4, 8), "kept": 6}
    x = arrays["log_prob"] - arrays["old_log_prob"]
    counted = arrays["response_mask"] & (tool.numpy() == 1)
    terms = np.exp(x - x**2 / 2) * arrays["advantages"][:, :1] * weight.numpy()
    np.testing.assert_allclose(loss.item(), -terms[counted].sum() / 15, rtol=1e-9)
    # On fresh data, trl gives no old log-probabilities, and weights only under vLLM.
    for name in ("old_per_token_logps", "importance_sampling_ratio", "tool_mask"):
        del inputs[name]
    trainer._compute_loss("model", inputs).backward()
    expected = np.where(arrays["response_mask"], -arrays["advantages"][:, :1] / 15, 0)
    np.testing.assert_allclose(log_prob.grad.numpy(), expected, rtol=1e-9)


def test_the_function_for_verl_takes_the_numbers_of_the_whole_batch(
    page: Any, arrays: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry: dict[str, Any] = {}
    names = ("verl", "verl.trainer", "verl.trainer.ppo", "verl.trainer.ppo.core_algos")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    core: Any = sys.modules[names[-1]]
    core.register_policy_loss = lambda name: lambda function: registry.setdefault(name, function)
    defined(monkeypatch, "verl_gipo")
    x = {name: torch.tensor(array) for name, array in arrays.items()}
    x["rollout_is_weights"] = page.rollout_weight(
        x["old_log_prob"], x.pop("rollout_log_prob"), x["response_mask"]
    )
    rollout = ("token", "truncate", (0.0, 2.0))
    step = {"dp_size": 2, "batch_num_tokens": 40, "global_batch_size": 8, "loss_scale_factor": 10}
    for mode in LOSS_AGG_MODES:
        denominator = 20 if mode == "token-mean" else 4
        given = {"max_tokens": 10} if mode == "seq-mean-token-sum-norm" else {}
        expected, _ = of_ours(arrays, rollout, loss_agg_mode=mode, denominator=denominator, **given)
        config = types.SimpleNamespace(global_batch_info=step)
        loss, metrics = registry["gipo"](**x, loss_agg_mode=mode, config=config)
        np.testing.assert_allclose(loss.item(), expected, rtol=1e-6)
        assert metrics == {}
    config = types.SimpleNamespace(global_batch_info={})
    loss, _ = registry["gipo"](**x, config=config)
    np.testing.assert_allclose(loss.item(), of_ours(arrays, rollout)[0], rtol=1e-6)
