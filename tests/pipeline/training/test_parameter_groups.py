"""The selected parameters are trained, and the others do not change."""

from collections.abc import Sequence

import pytest
from mini import mini_codec, mini_stage

from modules import HPCM
from pipeline.training.optimizer import (
    SelectionError,
    parameter_groups,
    set_trainable,
    trainable_names,
)
from pipeline.training.transfer import transfer_weights


@pytest.fixture
def child() -> tuple[HPCM, frozenset[str]]:
    parent, child = mini_codec(2), mini_codec(3)
    return child, transfer_weights(parent, child, mini_stage("phase3").transfer).new


def test_selection_by_word_and_pattern(child: tuple[HPCM, frozenset[str]]) -> None:
    model, new = child
    names = {name for name, _ in model.named_parameters()}
    assert trainable_names(model, "all", new) == names
    assert trainable_names(model, "new", new) == {name for name in names if name.startswith("context_net")}
    rwkv = {name for name in names if name.startswith(("context_net", "attn"))}
    assert trainable_names(model, ("rwkv", "h_a.*"), new) == rwkv | {n for n in names if n.startswith("h_a.")}


def test_trainable_is_set_in_both_directions(child: tuple[HPCM, frozenset[str]]) -> None:
    model, new = child
    for selection in ("new", "all", "new"):
        wanted = trainable_names(model, selection, new)
        set_trainable(model, wanted)
        assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == wanted


def test_every_trainable_parameter_is_in_exactly_one_group(child: tuple[HPCM, frozenset[str]]) -> None:
    model, new = child
    set_trainable(model, trainable_names(model, "all", new))
    groups = parameter_groups(model, {"default": 1e-4, "g_*": 2e-4, "new": 3e-4, "rwkv": 4e-4}, new)
    rates = {name: group["lr"] for group in groups for name in group["names"]}
    assert sum(len(group["params"]) for group in groups) == len(rates) == len(list(model.parameters()))
    assert rates["g_a.branch.0.weight"] == 2e-4
    assert rates["context_net.0.out_proj.weight"] == 3e-4
    assert rates["attn_s1.block.gamma1"] == 4e-4
    assert rates["h_s.branch.0.weight"] == 1e-4
    parameters = dict(model.named_parameters())
    assert all(parameters[n] is p for group in groups for n, p in zip(group["names"], group["params"], strict=True))


def test_weights_of_layers_decay_and_other_parameters_do_not(child: tuple[HPCM, frozenset[str]]) -> None:
    model, new = child
    set_trainable(model, trainable_names(model, "all", new))
    rates = {"default": 1e-4, "rwkv": 4e-4}
    divided = parameter_groups(model, rates, new, 0.01)
    decay = {name: group["weight_decay"] for group in divided for name in group["names"]}
    assert decay.keys() == {name for name, _ in model.named_parameters()}
    for name in ("g_a.branch.0.weight", "attn_s1.block.spatial_mix.key.weight"):
        assert decay[name] == 0.01
    for name in ("g_a.branch.0.bias", "attn_s1.block.ln1.weight", "attn_s1.block.gamma1", "scales_hyper"):
        assert decay[name] == 0
    assert {group["lr"] for group in divided if "attn_s1.block.gamma1" in group["names"]} == {4e-4}


@pytest.mark.parametrize(
    ("train", "rates", "message"),
    [
        (("g_x.*",), {"default": 1.0}, r"train: 'g_x.\*' matches no parameter"),
        (
            "all",
            {"g_x.*": 1.0, "default": 1.0},
            r"lr\['g_x.\*'\]: selects no trainable parameter; did you mean 'g_s.\*'\?",
        ),
        ("new", {"new": 1.0, "h_a.*": 1.0}, r"lr\['h_a.\*'\]: selects no trainable parameter \(an earlier key"),
        ("new", {"new": 1.0, "default": 1.0}, "lr.default: selects no trainable parameter"),
        ("all", {"rwkv": 1.0}, "no rate for means_hyper and .* more; add a `default`"),
    ],
)
def test_selections_that_select_nothing_are_named(
    train: str | Sequence[str], rates: dict[str, float], message: str, child: tuple[HPCM, frozenset[str]]
) -> None:
    model, new = child

    def select() -> None:
        set_trainable(model, trainable_names(model, train, new))
        parameter_groups(model, rates, new)

    with pytest.raises(SelectionError, match=message):
        select()
